"""Networks small enough for a second: every part of the real ones, a few thousand weights."""

import pytest
from transformers import ResNetConfig, SwinConfig, TimmBackboneConfig

from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def small_backbone(kind):
    if kind == "resnet":
        return ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
        )
    if kind == "swin":
        return SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES)
    return TimmBackboneConfig(backbone="mobilenetv2_035", out_indices=[1, 2, 3, 4])


@pytest.fixture
def small_config():
    def make(kind="resnet", **overrides):
        fields = {
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_layers": 2,
            "decoder_layers": 5,
            "num_attention_heads": 2,
            "encoder_feedforward_dim": 48,
            "dim_feedforward": 48,
            "num_queries": 7,
            "num_labels": 3,
            **overrides,
        }
        return SIMConfig(backbone_config=small_backbone(kind), **fields)

    return make


@pytest.fixture
def small_model(small_config):
    return lambda kind="resnet", **overrides: SIMForInstanceSegmentation(small_config(kind, **overrides)).eval()
