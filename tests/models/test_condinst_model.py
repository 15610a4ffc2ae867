"""CondInst: its outputs, detections by hand, padding, boxes that are asked for, saving and loading, every neck."""

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForInstanceSegmentation, ResNetConfig, SwinConfig

from sim_hf.models.architectures import PRESETS, architecture_of, architecture_of_preset, load_model, preset_processor
from sim_hf.models.condinst import CondInstConfig, CondInstForInstanceSegmentation
from sim_hf.models.condinst.class_transfer import load_pretrained_for_classes
from sim_hf.models.condinst.detections import answering_locations, class_logits_of, detect
from sim_hf.models.condinst.fcos_head import level_locations
from sim_hf.models.sim import SIMImageProcessor
from sim_hf.models.sim.padding import PADDING_LOGIT

STAGES = ["stage2", "stage3", "stage4"]


def small_config(backbone="resnet", **overrides):
    backbones = {
        "resnet": lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="bottleneck", out_features=STAGES
        ),
        "swin": lambda: SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES),
    }
    fields = {"feature_size": 16, "num_tower_layers": 1, "mask_feature_size": 16, "num_mask_layers": 1, "score_threshold": 0.0}
    labels = {} if "id2label" in overrides else {"num_labels": 3}
    return CondInstConfig(backbone_config=backbones[backbone](), **{**fields, **labels, **overrides})


def small_model(backbone="resnet", **overrides):
    return CondInstForInstanceSegmentation(small_config(backbone, **overrides)).eval()


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet", {}),
        ("swin", {}),
        ("resnet", {"neck": "bifpn", "num_bifpn_layers": 2}),
        ("resnet", {"deformable": True}),
        ("resnet", {"mask_norm": "batch", "mask_channels": 16, "dynamic_channels": 16}),
    ],
)
def test_every_parameter_takes_part_and_the_outputs_have_their_shapes(backbone, options):
    model = small_model(backbone, **options).train()
    outputs = model(torch.randn(2, 3, 64, 96), output_auxiliary_logits=True)
    num_locations = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1
    assert outputs.class_logits.shape == (2, num_locations, 3) and outputs.class_queries_logits is None
    assert outputs.mask_features.shape == (2, 16, 8, 12)
    masks = outputs.mask_logits(torch.tensor([0, 1]), torch.tensor([3, 100]))
    assert masks.shape == (2, 16, 24)
    loss = outputs.class_logits.square().sum() + outputs.box_distances.sum() + outputs.centerness_logits.sum() + masks.sum()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_model_without_instances_still_reaches_every_parameter():
    model = small_model().train()
    outputs = model(torch.randn(1, 3, 64, 64), output_auxiliary_logits=True)
    none = torch.zeros(0, dtype=torch.long)
    (outputs.mask_logits(none, none).sum() + outputs.class_logits.sum() + outputs.box_distances.sum()).backward()
    assert model.mask_branch.out.weight.grad is not None and model.head.controller.weight.grad is not None


def test_locations_are_the_centres_of_the_cells_of_all_levels():
    locations, levels = level_locations((16, 24), (8, 16), torch.device("cpu"))
    assert locations.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert levels.tolist() == [0] * 6 + [1] * 2


def test_detections_by_hand():
    """Two classes; locations 0 and 1 see one object of class 0, location 2 another of class 1 in the same box, location 3 is
    below the threshold, location 4 lies in the padding."""
    big = 12.0  # a logit of nearly 1
    classes = torch.tensor([[[big, -big], [2.0, -big], [-big, 1.0], [-3.0, -big], [big, -big]]])
    centerness = torch.tensor([[big, big, 0.0, big, big]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]]])
    valid = torch.tensor([[True, True, True, True, False]])
    found = detect(classes, centerness, boxes, valid, score_threshold=0.05, top_k=10, nms_threshold=0.6, max_detections=5)
    assert found.locations_N.tolist() == [0, 2] and found.labels_N.tolist() == [0, 1] and found.ranks_N.tolist() == [0, 1]
    expected = torch.tensor([1.0, (torch.tensor(1.0).sigmoid() * 0.5).sqrt()])
    torch.testing.assert_close(found.scores_N, expected, atol=1e-4, rtol=1e-4)


def test_the_softmax_of_a_detection_is_its_score():
    logits = class_logits_of(torch.tensor([1, 0]), torch.tensor([0.7, 0.0]), 3)
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0, 0.7, 0, 0.3], [0, 0, 0, 1.0]]), atol=1e-5, rtol=1e-5)


def test_a_given_box_is_answered_by_the_location_inside_it_whose_box_fits_best():
    locations = torch.tensor([[4.0, 4], [12, 4], [20, 4], [28, 4]])
    boxes = torch.tensor([[[0.0, 0, 8, 8], [8, 0, 24, 8], [8, 0, 16, 8], [24, 0, 32, 8]]])
    scores = torch.tensor([[[0.9], [0.5], [0.6], [0.9]]])
    prompts = torch.tensor([[[8.0, 0, 24, 8], [29, 1, 31, 2]]])
    chosen = answering_locations(prompts, locations, scores, boxes, torch.ones(1, 4, dtype=torch.bool))
    assert chosen.tolist() == [[1, 3]]  # 0.5 * 1 beats 0.6 * 0.5; nothing lies in the second box


def test_prompts_do_not_change_what_is_found():
    model, images = small_model(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)
        asked = model(images, prompt_boxes=torch.tensor([[[4.0, 4, 40, 40]]] * 2))
    assert torch.equal(plain.masks_queries_logits, asked.masks_queries_logits)
    assert asked.masks_prompts_logits.shape == (2, 1, 16, 16)
    torch.testing.assert_close(asked.class_prompts_logits.softmax(-1).sum(-1), torch.ones(2, 1))


def test_nothing_found_is_one_empty_query():
    outputs = small_model(score_threshold=0.99)(torch.randn(1, 3, 64, 64))
    assert outputs.class_queries_logits.softmax(-1)[..., -1].min() > 0.999
    found = SIMImageProcessor().post_process_crops(outputs, [(64, 64)], [(64, 64)], threshold=0.0)
    assert len(found[0]["scores"]) == 0


def test_what_stands_in_the_padding_changes_nothing_and_nothing_is_found_there():
    model = small_model()
    images, mask = torch.randn(1, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.long)
    mask[:, :, 64:] = 0
    other = torch.where(mask[:, None].bool(), images, torch.randn_like(images))
    with torch.no_grad():
        one, two = model(images, mask), model(other, mask)
    assert torch.equal(one.masks_queries_logits, two.masks_queries_logits)
    assert (one.masks_queries_logits[..., 16:] == PADDING_LOGIT).all()
    assert not one.valid_locations[0].view(-1)[8:12].any() and one.valid_locations[0, :8].all()


def test_saved_and_loaded_through_the_auto_classes(tmp_path):
    model = small_model(id2label={0: "ant", 1: "bee"}, category_ids=[3, 8])
    model.save_pretrained(tmp_path)
    preset_processor("condinst-tiny").save_pretrained(tmp_path)
    loaded = AutoModelForInstanceSegmentation.from_pretrained(tmp_path)
    assert type(loaded) is CondInstForInstanceSegmentation and type(load_model(tmp_path)) is CondInstForInstanceSegmentation
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SIMImageProcessor
    assert AutoConfig.from_pretrained(tmp_path).category_ids == [3, 8]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).masks_queries_logits, loaded.eval()(images).masks_queries_logits)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    model = small_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.scales"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"head\.scales"):
        load_model(tmp_path)


def test_classes_are_carried_over_by_name(tmp_path):
    model = small_model(id2label={0: "ant", 1: "bee"})
    model.save_pretrained(tmp_path)
    other, report = load_pretrained_for_classes(tmp_path, {0: "Bee", 1: "cat", 2: "dog"})
    assert report.transferred == ("Bee",) and report.fresh == ("cat", "dog")
    assert torch.equal(other.class_predictor.weight[0], model.class_predictor.weight[1])
    assert other.class_predictor.bias[1].item() == pytest.approx(-4.595, abs=1e-3)


def test_deformable_convolutions_begin_as_plain_ones():
    torch.manual_seed(0)
    plain = small_model()
    deformable = small_model(deformable=True)
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".offset." in name for name in missing) and len(missing) == 2 * 3
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(deformable(images).class_logits, plain(images).class_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_deformable_convolutions_work_in_bfloat16(how):
    """torchvision has none of that type on a CPU."""
    torch.manual_seed(0)
    model, images = small_model(deformable=True).train(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images, output_auxiliary_logits=True).class_logits
    if how == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model(images, output_auxiliary_logits=True).class_logits
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.float().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".offset." in name]
    assert gradients and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_activation_checkpointing_gives_the_same_gradients(backbone):
    model, images = small_model(backbone, neck="bifpn", num_bifpn_layers=2).train(), torch.randn(1, 3, 64, 64)
    for module in model.modules():  # the backbone's stochastic depth would differ from one forward to the next
        if type(module).__name__ == "SwinDropPath":
            module.drop_prob = 0.0
    found = []
    for is_on in (False, True):
        if is_on:
            model.activation_checkpointing_enable()
            assert {type(m).__name__ for m in model.modules() if getattr(m, "gradient_checkpointing", False)} >= {
                "Tower",
                "BiFPNLayer",
            }
        model.zero_grad()
        outputs = model(images, output_auxiliary_logits=True)
        (outputs.class_logits.square().sum() + outputs.box_distances.sum() + outputs.controllers.sum()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("condinst")])
def test_every_preset_is_a_network(name):
    config = architecture_of_preset(name).config.from_preset(name, id2label={0: "a"})
    if "r101" not in name:  # made slowly, of the same parts
        with torch.device("meta"):
            assert CondInstForInstanceSegmentation(config).class_predictor.out_channels == 1
    assert preset_processor(name).size.longest_edge in (256, 1333)


def test_another_backbone_gives_its_three_coarse_maps():
    config = CondInstConfig.from_preset("condinst-tiny", backbone="timm:mobilenetv2_035")
    assert list(config.backbone_config.out_indices) == [2, 3, 4]
    assert CondInstConfig.from_preset("condinst-r50-1x", backbone="convnext").backbone_config.out_features == STAGES


def test_wrong_fields_are_refused():
    for options, message in (
        ({"neck": "pan"}, "neck"),
        ({"mask_norm": "layer"}, "mask_norm"),
        ({"category_ids": [1]}, "category"),
    ):
        with pytest.raises(Exception, match=message):
            small_config(**options)
    with pytest.raises(Exception, match="deformable"):
        small_config("swin", deformable=True)


def test_an_architecture_is_found_by_its_folder(tmp_path):
    small_config().save_pretrained(tmp_path)
    assert architecture_of(tmp_path).model is CondInstForInstanceSegmentation
    with pytest.raises(ValueError, match="unknown preset 'r7'"):
        architecture_of_preset("r7")
