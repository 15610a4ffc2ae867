"""From the name of any backbone to a configuration whose feature maps Mask2Former can use. No network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig

FEATURE_STRIDES = (4, 8, 16, 32)


def resolve_backbone_config(backbone: str | Mapping[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """A backbone configuration with four feature maps.

    A configuration or a dict (with its `model_type`) is taken as it is. "timm:NAME" is a timm model, any other text a
    transformers model type with its default sizes. Four stages give their maps at strides 4, 8, 16, 32; a plain vision
    transformer (DINOv2) gives the maps after each quarter of its blocks, all at one stride, which the pixel level
    module resizes.
    """
    if isinstance(backbone, PreTrainedConfig):
        return backbone
    if isinstance(backbone, Mapping):
        fields = copy.deepcopy(dict(backbone))
        if "model_type" not in fields:
            raise ValueError(f"a backbone dict needs a 'model_type', got keys {sorted(fields)}")
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if backbone.startswith("timm:"):
        return _timm_config(backbone.removeprefix("timm:"))
    return _transformers_config(backbone)


def _timm_fields(name: str, out_indices: list[int]) -> dict[str, Any]:
    return {"model_type": "timm_backbone", "backbone": name, "out_indices": out_indices}


def _timm_config(name: str) -> PreTrainedConfig:
    try:
        with torch.device("meta"):
            model = AutoBackbone.from_config(resolve_backbone_config(_timm_fields(name, [0])))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm has no backbone {name!r} that gives feature maps: {error}") from error
    strides = [stage["reduction"] for stage in model._backbone.feature_info.info]
    if not set(FEATURE_STRIDES) <= set(strides):
        raise ValueError(
            f"timm backbone {name!r} has feature maps at strides {strides}, expected {FEATURE_STRIDES} among them; for a"
            " plain vision transformer name a transformers model type such as 'dinov2'"
        )
    last = len(strides) - 1
    out_indices = [last - strides[::-1].index(stride) for stride in FEATURE_STRIDES]
    config = resolve_backbone_config(_timm_fields(name, out_indices))
    _require_maps_of_any_size(name, config)
    return config


def _require_maps_of_any_size(name: str, config: PreTrainedConfig) -> None:
    """Some timm transformers take one input size only, or give their maps channels last."""
    height, width = 256, 320
    expected = [(height // stride, width // stride) for stride in FEATURE_STRIDES]
    try:
        with torch.device("meta"):
            maps = AutoBackbone.from_config(config)(torch.empty(1, 3, height, width)).feature_maps
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"timm backbone {name!r} does not take an input of {height} x {width}: {error}") from error
    shapes = [tuple(x.shape[-2:]) for x in maps]
    if shapes != expected:
        raise ValueError(f"timm backbone {name!r} gives maps of {shapes} for {height} x {width}, expected {expected}")


def _transformers_config(model_type: str) -> PreTrainedConfig:
    config = AutoConfig.for_model(model_type)
    if "stage_names" not in vars(config):
        raise ValueError(f"transformers model type {model_type!r} is not a backbone (its configuration has no stages)")
    stages = [name for name in config.stage_names if name != "stem"]
    if len(stages) % 4:
        raise ValueError(f"backbone {model_type!r} has {len(stages)} stages {stages}, expected a multiple of 4")
    quarter = len(stages) // 4
    config.out_features = stages[quarter - 1 :: quarter]
    return config
