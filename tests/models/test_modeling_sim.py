"""Our network against transformers' Mask2Former, and what ours adds: the padding, frozen BatchNorm, strict loading."""

import gc

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
)

from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor, SIMModel
from sim_hf.models.sim.padding import PADDING_LOGIT

BACKBONES = ["resnet", "swin", "timm"]


@pytest.fixture
def stock_model(small_config):
    def make(kind):
        fields = small_config(kind).to_dict()
        for name in ("model_type", "freeze_batch_norm", "category_ids"):
            fields.pop(name)
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**fields)).eval()
        for module in model.modules():  # the stock initialisation silences the batch norms
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.running_mean, std=0.1)
        return model

    return make


def everything(outputs):
    """All class and mask logits, so a loss on it reaches whatever can be reached."""
    logits = [{"c": outputs.class_queries_logits, "m": outputs.masks_queries_logits}, *outputs.auxiliary_logits]
    return sum((tensor.float() ** 2).mean() for entry in logits for tensor in entry.values())


def assert_same_outputs(ours, stock):
    torch.testing.assert_close(ours.class_queries_logits, stock.class_queries_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.masks_queries_logits, stock.masks_queries_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
def test_stock_checkpoint_loads_every_tensor_and_gives_the_same_output(stock_model, tmp_path, kind):
    stock = stock_model(kind)
    stock.save_pretrained(tmp_path)
    ours, info = SIMForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected, loaded = stock.state_dict(), ours.state_dict()
    assert set(expected) - set(loaded) == {"criterion.empty_weight"}
    assert set(loaded) <= set(expected)
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.items())

    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        reference = stock(images, output_auxiliary_logits=True)
        for pixel_mask in (None, torch.ones(2, 64, 96, dtype=torch.long)):
            outputs = ours.eval()(images, pixel_mask, output_auxiliary_logits=True, output_hidden_states=True)
            assert_same_outputs(outputs, reference)
            assert len(outputs.auxiliary_logits) == len(reference.auxiliary_logits) == 4
            for mine, theirs in zip(outputs.auxiliary_logits, reference.auxiliary_logits, strict=True):
                assert set(mine) == set(theirs)
                for name in mine:
                    torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_stock_ones(stock_model, small_config):
    stock = stock_model("resnet").train()
    ours = SIMForInstanceSegmentation(small_config("resnet", freeze_batch_norm=False)).train()
    ours.load_state_dict(stock.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    for model in (stock, ours):
        everything(model(images, output_auxiliary_logits=True)).backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", BACKBONES)
def test_save_and_load_round_trip_is_exact_also_on_a_dirty_heap(small_model, tmp_path, kind):
    model = small_model(kind, freeze_batch_norm=False, category_ids=[4, 8, 15])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    images, pixel_mask = torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.long)
    pixel_mask[:, 50:] = 0
    expected = model(images, pixel_mask)
    model.save_pretrained(tmp_path)
    # Buffers that nobody fills would read this garbage.
    garbage = [torch.full((size,), float("nan")) for size in (16, 64, 256, 1024, 4096, 65536) for _ in range(20)]
    del garbage
    gc.collect()
    loaded = SIMForInstanceSegmentation.from_pretrained(tmp_path)
    assert not loaded.training
    assert all(tensor.device.type == "cpu" for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert set(loaded.state_dict()) == set(model.state_dict())
    outputs = loaded(images, pixel_mask)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)
    assert torch.equal(outputs.class_queries_logits, expected.class_queries_logits)
    assert loaded.config.category_ids == [4, 8, 15] and loaded.config.freeze_batch_norm is False


def test_base_model_loads_from_the_full_checkpoint(small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    base = SIMModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.model.state_dict()[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("kind", BACKBONES)
def test_garbage_in_the_padding_changes_nothing(small_model, kind):
    model = small_model(kind)
    images, pixel_mask = torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.long)
    pixel_mask[0, 41:] = 0
    pixel_mask[0, :, 70:] = 0
    dirty = images.clone()
    dirty[0, :, 41:], dirty[0, :, :, 70:] = float("nan"), 1e9
    with torch.no_grad():
        clean_outputs, dirty_outputs = model(images, pixel_mask), model(dirty, pixel_mask)
    assert torch.equal(clean_outputs.masks_queries_logits, dirty_outputs.masks_queries_logits)
    assert torch.equal(clean_outputs.class_queries_logits, dirty_outputs.class_queries_logits)


def test_queries_look_inside_their_mask_and_never_into_the_padding(small_model):
    decoder = small_model().model.transformer_module.decoder
    states, features = torch.randn(7, 2, 32), torch.randn(2, 32, 16, 16)
    valid = torch.zeros(2, 64, 64, dtype=torch.bool)
    valid[0, :33, :50], valid[1] = True, True
    allowed = decoder._where_to_look(states, *decoder._region(features, valid, (8, 8)))
    masks = nn.functional.interpolate(decoder._mask_logits(states, features), size=(8, 8), mode="bilinear", align_corners=False)
    image = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    image[0, :, :5, :7], image[1] = True, True
    assert torch.equal(allowed, ((masks > 0) & image).flatten(2)[:, None])


def test_a_query_with_an_empty_mask_looks_at_the_whole_image(small_model):
    decoder = small_model().model.transformer_module.decoder
    valid = torch.zeros(1, 64, 64, dtype=torch.bool)
    valid[:, :32] = True
    nn.init.constant_(decoder.mask_predictor.mask_embedder.layers[-1].layers[0].weight, 0.0)
    nn.init.constant_(decoder.mask_predictor.mask_embedder.layers[-1].layers[0].bias, -1.0)
    allowed = decoder._where_to_look(torch.randn(7, 1, 32), *decoder._region(torch.ones(1, 32, 16, 16), valid, (4, 4)))
    assert torch.equal(allowed, torch.tensor([True] * 8 + [False] * 8).expand(1, 1, 7, 16))


def test_masks_end_at_the_padding_in_evaluation_and_keep_their_gradient_in_training(small_model):
    model = small_model("resnet")
    images, pixel_mask = torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64)
    pixel_mask[:, 33:] = 0  # row 8 of the mask grid still holds one image row
    with torch.no_grad():
        logits = model(images, pixel_mask, output_auxiliary_logits=True)
    for masks in (logits.masks_queries_logits, logits.auxiliary_logits[0]["masks_queries_logits"]):
        assert (masks[:, :, 9:] == PADDING_LOGIT).all()
        assert (masks[:, :, :9] != PADDING_LOGIT).all()
    trained = model.train()(images, pixel_mask).masks_queries_logits
    assert (trained != PADDING_LOGIT).all()


def test_an_image_that_is_padding_alone_gives_finite_outputs(small_model):
    model = small_model()
    pixel_mask = torch.ones(2, 32, 32)
    pixel_mask[1] = 0
    outputs = model(torch.randn(2, 3, 32, 32), pixel_mask)
    assert outputs.class_queries_logits.isfinite().all() and outputs.masks_queries_logits.isfinite().all()


def test_pixel_mask_of_another_size_is_refused(small_model):
    with pytest.raises(ValueError, match=r"pixel_mask must be .*\(1, 64, 64\).*got \(1, 32, 64\)"):
        small_model()(torch.randn(1, 3, 64, 64), torch.ones(1, 32, 64))


def test_labels_are_refused_because_the_loss_lives_in_training(small_model):
    with pytest.raises(ValueError, match="SIMTrainer"):
        small_model()(torch.randn(1, 3, 32, 32), labels=[{}])


def test_tuple_output_holds_the_same_tensors(small_model):
    model = small_model()
    images = torch.randn(1, 3, 64, 64)
    named, plain = model(images), model(images, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())
    assert torch.equal(plain[0], named.class_queries_logits) and torch.equal(plain[1], named.masks_queries_logits)
    assert torch.equal(plain[2], named.mask_features)


def test_hidden_states_and_attentions_come_when_asked_by_argument_or_config(small_model):
    model = small_model()
    images = torch.randn(1, 3, 64, 64)
    silent = model(images)
    assert silent.auxiliary_logits is silent.encoder_hidden_states is silent.attentions is None
    model.config.output_hidden_states = model.config.output_auxiliary_logits = True
    loud = model(images, output_attentions=True)
    assert [tuple(x.shape[-2:]) for x in loud.encoder_hidden_states] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert [tuple(x.shape[-2:]) for x in loud.pixel_decoder_hidden_states] == [(2, 2), (4, 4), (8, 8)]
    assert len(loud.transformer_decoder_hidden_states) == 5 and len(loud.auxiliary_logits) == 4
    assert len(loud.attentions) == 4 and loud.attentions[0].shape == (1, 2, 7, 7)
    assert loud.mask_features.shape == (1, 32, 16, 16)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("origin", ["new", "loaded"])
def test_every_trainable_parameter_gets_a_gradient(small_model, tmp_path, kind, origin):
    model = small_model(kind)
    if origin == "loaded":
        model.save_pretrained(tmp_path)
        model = SIMForInstanceSegmentation.from_pretrained(tmp_path)
    model.train()
    pixel_mask = torch.ones(2, 64, 64, dtype=torch.long)
    pixel_mask[0, 40:] = 0
    everything(model(torch.randn(2, 3, 64, 64), pixel_mask, output_auxiliary_logits=True)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all("swin.layernorm" in name for name in frozen) and len(frozen) == (2 if kind == "swin" else 0)


@pytest.mark.parametrize("kind", ["resnet", "timm"])
@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_statistics_move_only_when_not_frozen(small_model, kind, frozen):
    model = small_model(kind, freeze_batch_norm=frozen).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    everything(model(torch.randn(2, 3, 64, 64), output_auxiliary_logits=True)).backward()
    same = [torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    assert norms and all(same) if frozen else not any(same)
    assert all(norm.weight.grad is not None for norm in norms)
    assert all(norm.training is not frozen for norm in norms)
    assert model.training and not any(norm.training for norm in model.eval().modules())


@pytest.mark.parametrize("kind", ["resnet", "timm"])
def test_batch_norms_start_as_the_identity(small_model, kind):
    for module in small_model(kind).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.bias == 0).all()
            assert (module.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_same_masks_roughly(small_model, dtype):
    model = small_model("resnet")
    images, pixel_mask = torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.long)
    pixel_mask[:, 40:] = 0
    with torch.no_grad():
        expected = model(images, pixel_mask)
        outputs = model.to(dtype)(images, pixel_mask)
    assert outputs.masks_queries_logits.dtype == outputs.class_queries_logits.dtype == dtype
    torch.testing.assert_close(outputs.mask_features.float(), expected.mask_features, atol=0.2, rtol=0.1)
    assert outputs.masks_queries_logits.isfinite().all() and outputs.class_queries_logits.isfinite().all()


def test_double_precision_gives_the_same_masks(small_model):
    model, images = small_model(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).masks_queries_logits
        found = model.double()(images.double()).masks_queries_logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


def test_training_under_bfloat16_autocast_gives_finite_gradients(small_model):
    model = small_model("resnet").train()
    pixel_mask = torch.ones(2, 64, 64, dtype=torch.long)
    pixel_mask[0, 40:] = 0
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(2, 3, 64, 64), pixel_mask, output_auxiliary_logits=True)
    everything(outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_activation_checkpointing_changes_no_gradient(small_model, kind):
    model = small_model(kind).train()
    for module in model.modules():  # stochastic depth would draw twice
        if type(module).__name__ == "SwinDropPath":
            module.drop_prob = 0.0
    images = torch.randn(1, 3, 64, 64)

    def gradients():
        model.zero_grad()
        everything(model(images, output_auxiliary_logits=True)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_auto_classes_find_our_classes(small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    SIMImageProcessor.from_preset("tiny").save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SIMConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is SIMModel
    for auto in (AutoModelForInstanceSegmentation, AutoModelForUniversalSegmentation, AutoModelForImageSegmentation):
        assert type(auto.from_pretrained(tmp_path)) is SIMForInstanceSegmentation
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is SIMImageProcessor and dict(processor.size) == {"longest_edge": 256}
