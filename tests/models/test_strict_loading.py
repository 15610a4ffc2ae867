"""from_pretrained: everything or an error that names what is wrong; and the ways in which weights can lie somewhere."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.models.swin.modeling_swin import SwinBackbone

from sim_hf.models.sim import SIMForInstanceSegmentation, SIMModel

HEAD = "class_predictor.weight"
QUERIES = "model.transformer_module.queries_features.weight"


@pytest.fixture
def change_weights(small_model, tmp_path):
    """A saved model whose tensors `change` edits -> its folder."""

    def make(change, kind="resnet", **overrides):
        small_model(kind, **overrides).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


@pytest.fixture
def save_stock(small_config, tmp_path):
    """A stock Mask2Former checkpoint -> its folder and the model."""

    def make(kind, folder=tmp_path):
        fields = small_config(kind).to_dict()
        for name in ("model_type", "freeze_batch_norm", "category_ids", "box_prompts"):
            fields.pop(name)
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**fields))
        model.save_pretrained(folder)
        return folder, model

    return make


def test_missing_weights_are_named(change_weights):
    folder = change_weights(lambda tensors: tensors.pop(QUERIES))
    with pytest.raises(ValueError, match=rf"not a complete checkpoint of SIMFor.*; missing: {QUERIES} \(1\)"):
        SIMForInstanceSegmentation.from_pretrained(folder)


def test_weights_that_are_left_over_are_named(change_weights):
    folder = change_weights(lambda tensors: tensors.update({"model.prototypes": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"unexpected: model\.prototypes \(1\)"):
        SIMForInstanceSegmentation.from_pretrained(folder)


def test_weights_that_were_cut_off_are_an_error_in_words(small_model, tmp_path):
    small_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    for end in (-100, 100, 0):
        file.write_bytes(file.read_bytes()[:end])
        with pytest.raises(ValueError, match=f"{tmp_path}: the weights are damaged"):
            SIMForInstanceSegmentation.from_pretrained(tmp_path)


def test_misshapen_weights_are_named_with_both_shapes(change_weights):
    folder = change_weights(lambda tensors: tensors.update({QUERIES: torch.zeros(9, 32)}))
    with pytest.raises(ValueError, match=rf"misshapen: {QUERIES} \(9, 32\) instead of \(7, 32\) \(1\)"):
        SIMForInstanceSegmentation.from_pretrained(folder)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_named(change_weights, value):
    folder = change_weights(lambda tensors: tensors[QUERIES][3].fill_(float(value)))
    with pytest.raises(ValueError, match=rf"not finite: {QUERIES} \(1\)"):
        SIMForInstanceSegmentation.from_pretrained(folder)


def test_all_faults_are_in_one_error_and_long_lists_are_counted(change_weights):
    def change(tensors):
        for name in [name for name in tensors if ".decoder.layers.0." in name]:
            del tensors[name]
        tensors[HEAD][0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"missing: .* and \d+ more \(\d+\); not finite: class_predictor\.weight"):
        SIMForInstanceSegmentation.from_pretrained(change_weights(change))


def test_a_checkpoint_of_other_classes_needs_to_be_told_that_the_head_starts_fresh(small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"misshapen: class_predictor\.bias \(4,\) instead of \(8,\), class_predictor\.weight"):
        SIMForInstanceSegmentation.from_pretrained(tmp_path, num_labels=7)
    other = SIMForInstanceSegmentation.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other.class_predictor.out_features == 8 and other.class_predictor.weight.isfinite().all()
    kept = other.model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.model.state_dict().items())


def test_only_the_head_may_start_fresh_then(change_weights):
    folder = change_weights(lambda tensors: tensors.update({QUERIES: torch.zeros(9, 32)}))
    with pytest.raises(ValueError, match=rf"misshapen: {QUERIES}"):
        SIMForInstanceSegmentation.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    loaded = SIMForInstanceSegmentation.from_pretrained(folder, reinitialize=["queries_features"])
    assert loaded.get_parameter(QUERIES).shape == (7, 32)


def test_a_checkpoint_without_a_head_gives_the_base_model_and_needs_to_be_told_for_the_whole(small_model, tmp_path):
    small_model().model.save_pretrained(tmp_path)
    assert isinstance(SIMModel.from_pretrained(tmp_path), SIMModel)
    with pytest.raises(ValueError, match=r"missing: class_predictor\.bias, class_predictor\.weight"):
        SIMForInstanceSegmentation.from_pretrained(tmp_path)
    SIMForInstanceSegmentation.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_counts_of_batches_may_be_missing(change_weights):
    """Checkpoints from before PyTorch had them."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("num_batches_tracked")]:
            del tensors[name]

    SIMForInstanceSegmentation.from_pretrained(change_weights(change))


@pytest.mark.parametrize("kind", ["resnet", "swin", "timm"])
def test_a_stock_checkpoint_loads_without_a_warning(save_stock, kind, caplog, monkeypatch):
    folder, stock = save_stock(kind)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        model = SIMForInstanceSegmentation.from_pretrained(folder)
    assert caplog.text == ""
    assert torch.equal(model.class_predictor.weight, stock.class_predictor.weight)


def test_a_stock_swin_checkpoint_of_old_names_loads(save_stock):
    """Checkpoints on the Hub name Swin's tensors as transformers 4 did. They hold its index buffers, which are computed, and no
    last norm, which nobody reads."""
    folder, stock = save_stock("swin")
    tensors = load_file(folder / "model.safetensors")
    tables = [name for name in tensors if name.endswith("attention.self.relative_position_bias_table")]
    assert len(tables) == 4  # old names
    for name in tables:
        tensors[name.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.int64)
    for name in [name for name in tensors if "swin.layernorm" in name]:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = SIMForInstanceSegmentation.from_pretrained(folder)
    encoder = loaded.model.pixel_level_module.encoder
    assert isinstance(encoder, SwinBackbone)
    expected = stock.model.pixel_level_module.encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"model": "cpu", "class_predictor": "cpu"}},
    ],
    ids=str,
)
def test_dtype_and_device_map(small_model, tmp_path, options):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = SIMForInstanceSegmentation.from_pretrained(tmp_path, **options)
    dtype = torch.bfloat16 if "dtype" in options else torch.float32
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, outputs = model.to(dtype)(images), loaded(images)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)


def test_a_device_map_may_leave_weights_on_the_disk(small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    parts = {"model.pixel_level_module": "cpu", "model.transformer_module": "disk", "class_predictor": "cpu"}
    loaded = SIMForInstanceSegmentation.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images).masks_queries_logits, model(images).masks_queries_logits)


def test_a_checkpoint_in_several_files(small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = SIMForInstanceSegmentation.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(OSError, match="safetensors"):
        SIMForInstanceSegmentation.from_pretrained(tmp_path)


def test_a_revision_of_a_hub_id_from_the_cache(small_model, tmp_path):
    commits = {"main": "a" * 40, "v1": "b" * 40}
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    models = {}
    for revision, commit in commits.items():
        models[revision] = small_model()
        models[revision].save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    for revision, model in models.items():
        loaded = SIMForInstanceSegmentation.from_pretrained("owner/name", revision=revision, cache_dir=tmp_path)
        assert torch.equal(loaded.class_predictor.weight, model.class_predictor.weight)
    with pytest.raises(OSError, match="offline"):
        SIMForInstanceSegmentation.from_pretrained("owner/name", revision="v2", cache_dir=tmp_path)
