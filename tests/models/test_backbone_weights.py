"""Pretrained backbones and checkpoints for other classes: everything loads, or a ValueError says what did not."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetForImageClassification, SwinForImageClassification

from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation, load_backbone_weights, load_pretrained_for_classes


def encoder_of(model):
    return model.model.pixel_level_module.encoder


def timm_classifier(name):
    classifier = timm.create_model(name, pretrained=False, num_classes=5)
    with torch.no_grad():
        for tensor in classifier.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor))
    return classifier


@pytest.fixture
def mobilenet_file(tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_file(timm_classifier("mobilenetv2_035").state_dict(), path)
    return path


def test_timm_classifier_fills_the_backbone_and_its_head_is_ignored(small_model, mobilenet_file):
    model = small_model("timm")
    other = {name: tensor.clone() for name, tensor in model.state_dict().items() if "pixel_level_module.encoder" not in name}
    report = load_backbone_weights(model, mobilenet_file)
    source = load_file(mobilenet_file)
    loaded = encoder_of(model)._backbone.state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in loaded.items())
    assert report.num_loaded == len(loaded) and report.ignored_heads == ("bn2", "classifier", "conv_head")
    assert str(report).count("\n") == 0 and str(mobilenet_file) in str(report) and "bn2" in str(report)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.items())


def test_timm_names_flattened_by_features_only_are_found(small_config, tmp_path):
    """features_only renames stages.0 to stages_0; the classifier's file has the first form."""
    model = SIMForInstanceSegmentation(SIMConfig.from_preset("tiny", num_labels=2, backbone="timm:convnext_atto"))
    save_file(timm_classifier("convnext_atto").state_dict(), tmp_path / "model.safetensors")
    report = load_backbone_weights(model, tmp_path)
    assert report.num_loaded == len(encoder_of(model)._backbone.state_dict()) and report.ignored_heads == ("head",)
    source = load_file(tmp_path / "model.safetensors")
    loaded = encoder_of(model)._backbone.state_dict()
    assert torch.equal(loaded["stages_1.blocks.0.gamma"], source["stages.1.blocks.0.gamma"])


def test_a_saved_transformers_backbone_with_its_prefix_and_without_batch_counts_loads(small_model, tmp_path):
    model, other = small_model("timm"), small_model("timm")
    state = {name: t for name, t in encoder_of(other).state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "features.safetensors")
    report = load_backbone_weights(model, tmp_path / "features.safetensors")
    assert report.num_loaded == len(state) and report.ignored_heads == ()
    assert torch.equal(encoder_of(model)._backbone.conv_stem.weight, encoder_of(other)._backbone.conv_stem.weight)


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_transformers_classifier_fills_the_backbone(small_model, tmp_path, kind):
    model = small_model(kind)
    config = encoder_of(model).config
    classes = {"resnet": ResNetForImageClassification, "swin": SwinForImageClassification}
    classifier = classes[kind](type(config).from_dict({**config.to_dict(), "num_labels": 4}))
    classifier.save_pretrained(tmp_path)
    report = load_backbone_weights(model, tmp_path)
    key = {
        "resnet": lambda m: m.encoder.stages[1].layers[0].layer[0].convolution.weight,
        "swin": lambda m: next(p for n, p in m.named_parameters() if "layers.1.blocks.0" in n and "q_proj.weight" in n),
    }[kind]
    base = {"resnet": lambda m: m.resnet, "swin": lambda m: m.swin}[kind]
    assert torch.equal(key(encoder_of(model)), key(base(classifier)))
    assert report.ignored_heads == ("classifier",)
    assert bool(report.newly_initialized) is (kind == "swin")


def test_sharded_folder_loads(small_model, mobilenet_file, tmp_path):
    tensors = load_file(mobilenet_file)
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_backbone_weights(small_model("timm"), folder).num_loaded > 200


def drop(tensors):
    del tensors["blocks.0.0.conv_dw.weight"]


def add(tensors):
    tensors["neck.weight"] = torch.zeros(1)


def reshape(tensors):
    tensors["conv_stem.weight"] = torch.zeros(4, 3, 3, 3)


def spoil(tensors):
    tensors["bn1.weight"][0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing: blocks\.0\.0\.conv_dw\.weight"),
        (add, r"unexpected: neck\.weight"),
        (reshape, r"misshapen: conv_stem\.weight \(4, 3, 3, 3\) instead of"),
        (spoil, r"not finite: bn1\.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(small_model, mobilenet_file, change, message):
    tensors = load_file(mobilenet_file)
    change(tensors)
    save_file(tensors, mobilenet_file)
    model = small_model("timm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_backbone_weights(model, mobilenet_file)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("change", ["drop", "reshape", "spoil"])
def test_a_transformers_file_that_does_not_fit_is_refused(small_model, tmp_path, change):
    model = small_model("resnet")
    tensors = {name: tensor.clone() for name, tensor in encoder_of(model).state_dict().items()}
    name = "embedder.embedder.convolution.weight"
    if change == "drop":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(1, 3, 7, 7) if change == "reshape" else torch.full_like(tensors[name], float("inf"))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embedder\.embedder\.convolution\.weight"):
        load_backbone_weights(model, tmp_path)


def test_pickles_and_unknown_sources_are_refused(small_model, tmp_path):
    model = small_model("timm")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for source, message in [
        (tmp_path / "pytorch_model.bin", "not a .safetensors file"),
        (tmp_path, "pickled weights can run code.*pytorch_model.bin"),
        (tmp_path / "nothing.safetensors", "no file, no folder and no Hub id"),
        ("mobilenet", "no file, no folder and no Hub id"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_backbone_weights(model, source)


def test_classes_of_equal_name_keep_their_weights(small_model, tmp_path):
    old = small_model(id2label={0: "cat", 1: "Dog", 2: "bird"}, label2id={"cat": 0, "Dog": 1, "bird": 2})
    with torch.no_grad():
        old.class_predictor.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    old.config.category_ids = [17, 18, 16]
    old.save_pretrained(tmp_path)
    model, report = load_pretrained_for_classes(tmp_path, {0: "dog", 1: "horse", 2: "cat", 3: "cow"})
    assert report.transferred == ("dog", "cat") and report.fresh == ("horse", "cow")
    assert "2 transferred (dog, cat), 2 fresh (horse, cow)" in str(report)
    assert model.class_predictor.bias.tolist() == [2.0, 0.0, 1.0, 0.0, 4.0]
    weight = model.class_predictor.weight
    assert torch.equal(weight[[0, 2, 4]], old.class_predictor.weight[[1, 0, 3]])
    assert 0 < weight[1].std() < 0.1
    assert model.config.num_labels == 4 and model.config.id2label[3] == "cow" and model.config.category_ids is None
    rest = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith("class_predictor")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in rest.items())
    model.save_pretrained(tmp_path / "again")
    again = SIMForInstanceSegmentation.from_pretrained(tmp_path / "again")
    assert torch.equal(again.class_predictor.weight, weight) and again.config.label2id["horse"] == 1
    assert again(torch.randn(1, 3, 64, 64)).class_queries_logits.shape == (1, 7, 5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{"),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
    ],
)
def test_a_damaged_folder_of_weights_is_an_error_in_words(small_model, tmp_path, name, content):
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_backbone_weights(small_model(), folder)


def test_an_incomplete_or_broken_checkpoint_is_refused(small_model, tmp_path):
    small_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.transformer_module.queries_features.weight"
    for broken, message in [
        ({key: tensor for key, tensor in tensors.items() if key != name}, "missing: model.transformer_module"),
        ({**tensors, "extra.weight": torch.zeros(1)}, "unexpected: extra.weight"),
        ({**tensors, name: torch.zeros(3, 32)}, "misshapen: .*queries_features"),
        ({**tensors, name: tensors[name] * float("nan")}, "not finite: model.transformer_module"),
    ]:
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_pretrained_for_classes(tmp_path, {0: "cat"})
    with pytest.raises(ValueError, match="id2label must number"):
        load_pretrained_for_classes(tmp_path, {3: "cat"})
