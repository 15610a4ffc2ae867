"""Presets and backbones by name, without a network."""

import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import ConvNextConfig, ResNetConfig
from transformers.models.mask2former import configuration_mask2former

from sim_hf.models.sim import PRESETS, SIMConfig, SIMForInstanceSegmentation


@pytest.mark.parametrize(
    ("preset", "channels", "millions"),
    [
        ("tiny", [24, 32, 96, 320], 3.6),
        ("r50", [256, 512, 1024, 2048], 44.0),
        ("r101", [256, 512, 1024, 2048], 63.0),
        ("swin-t", [96, 192, 384, 768], 47.4),
        ("swin-b", [128, 256, 512, 1024], 106.9),
    ],
)
def test_preset_builds_the_network_of_the_paper(preset, channels, millions):
    config = SIMConfig.from_preset(preset, id2label={0: "cat", 1: "dog"})
    with torch.device("meta"):
        model = SIMForInstanceSegmentation(config)
    assert list(model.model.pixel_level_module.encoder.channels) == channels
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.02)
    assert model.class_predictor.out_features == 3
    assert SIMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_every_preset_is_tested_above():
    assert set(PRESETS) == {"tiny", "r50", "r101", "swin-t", "swin-b"}


def test_tiny_maps_have_strides_4_to_32():
    model = SIMForInstanceSegmentation(SIMConfig.from_preset("tiny", num_labels=2)).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 96), output_hidden_states=True).encoder_hidden_states
    assert [tuple(x.shape[-2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_names_and_overrides_reach_the_configuration():
    config = SIMConfig.from_preset("tiny", id2label={0: "cat", 1: "dog"}, num_queries=11, category_ids=[17, 18])
    assert config.id2label == {0: "cat", 1: "dog"} and config.label2id == {"cat": 0, "dog": 1}
    assert config.num_queries == 11 and config.category_ids == [17, 18] and config.freeze_batch_norm is True
    assert SIMConfig.from_preset("tiny", num_labels=5).num_labels == 5


def test_presets_do_not_share_their_backbone_configuration():
    SIMConfig.from_preset("r50").backbone_config.depths = [1, 1, 1, 1]
    assert SIMConfig.from_preset("r50").backbone_config.depths == [3, 4, 6, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "huge"}, "unknown preset 'huge'"),
        ({"name": "tiny", "id2label": {1: "cat"}}, r"0\.\.0, got keys \[1\]"),
        ({"name": "tiny", "backbone": "timm:no_such_model"}, "no_such_model"),
        ({"name": "tiny", "backbone": "timm:vit_tiny_patch16_224"}, "dinov2"),
        ({"name": "tiny", "backbone": "timm:swin_tiny_patch4_window7_224"}, "swin_tiny"),
        ({"name": "tiny", "backbone": "bert"}, "not a backbone"),
        ({"name": "tiny", "backbone": {"depths": [1]}}, "model_type"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SIMConfig.from_preset(**arguments)


def test_category_ids_must_fit_the_labels():
    with pytest.raises(StrictDataclassClassValidationError, match=r"one id per label \(2\), got 3"):
        SIMConfig.from_preset("tiny", num_labels=2, category_ids=[1, 2, 3])


def test_a_wrong_type_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="freeze_batch_norm"):
        SIMConfig.from_preset("tiny", freeze_batch_norm="yes")


def test_backbones_other_than_swin_cause_no_warning(caplog, monkeypatch):
    monkeypatch.setattr(configuration_mask2former.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        SIMConfig.from_preset("r50")
    assert "not a supported model" not in caplog.text


@pytest.mark.parametrize(
    ("backbone", "model_type", "out_indices"),
    [
        ("timm:convnext_tiny", "timm_backbone", [0, 1, 2, 3]),
        ("timm:resnet18", "timm_backbone", [1, 2, 3, 4]),
        ("swin", "swin", [1, 2, 3, 4]),
        ("convnext", "convnext", [1, 2, 3, 4]),
        ("dinov2", "dinov2", [3, 6, 9, 12]),
        (ConvNextConfig(out_indices=[1, 2, 3, 4]), "convnext", [1, 2, 3, 4]),
        ({"model_type": "resnet", "depths": [2, 2, 2, 2], "out_indices": [1, 2, 3, 4]}, "resnet", [1, 2, 3, 4]),
    ],
)
def test_any_backbone_can_be_named(backbone, model_type, out_indices):
    config = SIMConfig.from_preset("tiny", num_labels=2, backbone=backbone).backbone_config
    assert config.model_type == model_type
    assert list(config.out_indices) == out_indices


def test_plain_vision_transformer_gives_maps_at_strides_4_to_32():
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
        "out_indices": [1, 2, 3, 4],
    }
    model = SIMForInstanceSegmentation(SIMConfig.from_preset("tiny", num_labels=2, backbone=backbone, box_prompts=False)).train()
    outputs = model(torch.randn(1, 3, 64, 96), output_hidden_states=True)
    assert [tuple(x.shape[-2:]) for x in outputs.encoder_hidden_states] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    (outputs.masks_queries_logits.mean() + outputs.class_queries_logits.mean()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_backbone_with_another_number_of_maps_is_refused():
    config = SIMConfig.from_preset("tiny", num_labels=2, backbone=ResNetConfig(out_features=["stage3", "stage4"]))
    with pytest.raises(ValueError, match="4 feature maps, got 2"), torch.device("meta"):
        SIMForInstanceSegmentation(config)
