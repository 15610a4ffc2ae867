"""CondInst and BoxInst checkpoints of AdelaiDet and mmdetection (ResNet with FPN), by the names of their tensors.

| part | AdelaiDet | mmdetection |
|---|---|---|
| backbone | `backbone.bottom_up.res2.0.conv1.norm.weight` | `backbone.layer1.0.bn1.weight` |
| pyramid | `backbone.fpn_lateral3`, `fpn_output3`, `top_block.p6` | `neck.lateral_convs.0.conv`, `fpn_convs.0`, `fpn_convs.3` |
| towers | `proposal_generator.fcos_head.cls_tower`, `bbox_tower` | `bbox_head.cls_convs.0.conv`, `.gn`, `reg_convs` |
| predictors | `cls_logits`, `bbox_pred`, `ctrness`, `scales` | `conv_cls`, `conv_reg`, `conv_centerness`, `scales` |
| controller | `controller` | `bbox_head.controller` |
| mask branch | `mask_branch.refine`, `mask_branch.tower` | `mask_head.mask_feature_head.convs_all_levels`, `conv_branch` |

A controller's numbers have one order in all of them (`dynamic_mask_head.split_parameters`). Left out: the branch of semantic
segmentation that helped to train (`seg_head`, `logits`), and buffers that count steps or hold the sizes of interest.

Two things differ: AdelaiDet doubles masks with a bilinear grid that is aligned to corners, and its weights of ResNets expect
colours as BGR in 0 to 255 and have the stride in the first convolution of a block (`caffe=True`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration_condinst import STRIDES, CondInstConfig
from .dynamic_mask_head import hidden_channels
from .modeling_condinst import CondInstForInstanceSegmentation

_BACKBONE = "model.pixel_level_module.encoder."
_PYRAMID = "model.pixel_level_module.decoder.pyramid."
_DEPTHS = {6: [3, 4, 6, 3], 23: [3, 4, 23, 3]}  # by the blocks of the third stage
_LEFT_OUT = re.compile(
    r"mask_branch\.(seg_head|logits)\.|mask_head\.(_iter|sizes_of_interest|_iter\w*)$|bbox_head\.loss|pixel_(mean|std)$"
)

_ADELAIDET = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", _BACKBONE + "embedder.embedder.normalization."),
    (r"backbone\.bottom_up\.stem\.conv1\.", _BACKBONE + "embedder.embedder.convolution."),
    (r"backbone\.fpn_lateral(\d)\.", lambda m: f"{_PYRAMID}inner_blocks.{int(m[1]) - 3}.0."),
    (r"backbone\.fpn_output(\d)\.", lambda m: f"{_PYRAMID}layer_blocks.{int(m[1]) - 3}.0."),
    (r"backbone\.top_block\.", _PYRAMID + "extra_blocks."),
    (r"proposal_generator\.fcos_head\.cls_tower\.", "head.class_tower."),
    (r"proposal_generator\.fcos_head\.bbox_tower\.", "head.box_tower."),
    (r"proposal_generator\.fcos_head\.cls_logits\.", "class_predictor."),
    (r"proposal_generator\.fcos_head\.bbox_pred\.", "head.box_predictor."),
    (r"proposal_generator\.fcos_head\.ctrness\.", "head.centerness_predictor."),
    (r"proposal_generator\.fcos_head\.scales\.(\d)\.scale$", r"scales.\1"),
    (r"controller\.", "head.controller."),
    (r"mask_branch\.tower\.(\d+)\.(weight|bias)$", r"mask_branch.out.\2"),
    (r"mask_branch\.", "mask_branch."),
)
_MMDETECTION = (
    (r"backbone\.conv1\.", _BACKBONE + "embedder.embedder.convolution."),
    (r"backbone\.bn1\.", _BACKBONE + "embedder.embedder.normalization."),
    (r"neck\.lateral_convs\.(\d)\.conv\.", _PYRAMID + r"inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.([012])\.conv\.", _PYRAMID + r"layer_blocks.\1.0."),
    (r"neck\.fpn_convs\.([34])\.conv\.", lambda m: f"{_PYRAMID}extra_blocks.p{int(m[1]) + 3}."),
    (r"bbox_head\.cls_convs\.(\d)\.conv\.", lambda m: f"head.class_tower.{3 * int(m[1])}."),
    (r"bbox_head\.cls_convs\.(\d)\.gn\.", lambda m: f"head.class_tower.{3 * int(m[1]) + 1}."),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.", lambda m: f"head.box_tower.{3 * int(m[1])}."),
    (r"bbox_head\.reg_convs\.(\d)\.gn\.", lambda m: f"head.box_tower.{3 * int(m[1]) + 1}."),
    (r"bbox_head\.conv_cls\.", "class_predictor."),
    (r"bbox_head\.conv_reg\.", "head.box_predictor."),
    (r"bbox_head\.conv_centerness\.", "head.centerness_predictor."),
    (r"bbox_head\.scales\.(\d)\.scale$", r"scales.\1"),
    (r"bbox_head\.controller\.", "head.controller."),
    (r"mask_head\.mask_feature_head\.convs_all_levels\.(\d)\.conv\d\.conv\.", r"mask_branch.refine.\1.0."),
    (r"mask_head\.mask_feature_head\.convs_all_levels\.(\d)\.conv\d\.bn\.", r"mask_branch.refine.\1.1."),
    (r"mask_head\.mask_feature_head\.conv_branch\.(\d)\.conv\.", r"mask_branch.tower.\1.0."),
    (r"mask_head\.mask_feature_head\.conv_branch\.(\d)\.bn\.", r"mask_branch.tower.\1.1."),
    (r"mask_head\.mask_feature_head\.conv_pred\.", "mask_branch.out."),
)
_BLOCKS = (
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.", 2, "shortcut.normalization."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.", 2, "shortcut.convolution."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.", 2, "layer.{}.normalization."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.", 2, "layer.{}.convolution."),
    (r"backbone\.layer(\d)\.(\d+)\.downsample\.0\.", 1, "shortcut.convolution."),
    (r"backbone\.layer(\d)\.(\d+)\.downsample\.1\.", 1, "shortcut.normalization."),
    (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.", 1, "layer.{}.convolution."),
    (r"backbone\.layer(\d)\.(\d+)\.bn(\d)\.", 1, "layer.{}.normalization."),
)


def our_name(name: str) -> str | None:
    """The name here of a tensor there; None for what is left out. Scales are `scales.0` to `scales.4`, one number each.

    A name that neither project has is a ValueError.
    """
    if _LEFT_OUT.match(name):
        return None
    for pattern, first_stage, part in _BLOCKS:
        if match := re.match(pattern, name):
            stage, block = int(match[1]) - first_stage, match[2]
            layer = int(match[3]) - 1 if "{}" in part else ""
            return f"{_BACKBONE}encoder.stages.{stage}.layers.{block}.{part.format(layer)}{name[match.end() :]}"
    for pattern, replacement in (*_ADELAIDET, *_MMDETECTION):
        ours, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return ours
    raise ValueError(f"{name!r} is no tensor of a CondInst or BoxInst of AdelaiDet or mmdetection (ResNet with FPN)")


def converted(tensors: Mapping[str, Tensor], *, caffe: bool = False) -> dict[str, Tensor]:
    """A state dict of ours. caffe: the weights expect BGR; the first convolution is turned to RGB, and the image processor must
    get `image_std=[1 / 255] * 3`."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = our_name(name)
        if ours is not None:
            if ours in state:
                raise ValueError(f"two tensors are {ours!r}; the second is {name!r}")
            state[ours] = tensor
    missing = [level for level in range(len(STRIDES)) if f"scales.{level}" not in state]
    if missing:
        raise ValueError(f"the scales of levels {missing} are missing")
    state["head.scales"] = torch.stack([state.pop(f"scales.{level}").reshape(()) for level in range(len(STRIDES))])
    if caffe:
        first = _BACKBONE + "embedder.embedder.convolution.weight"
        state[first] = state[first].flip(1)
    return state


def load_public_checkpoint(
    tensors: Mapping[str, Tensor], *, caffe: bool = False, id2label: Mapping[int, str] | None = None
) -> CondInstForInstanceSegmentation:
    """The network that a checkpoint of AdelaiDet or mmdetection holds; its depth and sizes follow from the tensors.

    tensors: by name, as `torch.load(..., weights_only=True)` gives them under `model` or `state_dict`. Strictly: what is missing,
    left over or misshapen is a ValueError.
    """
    state = converted(tensors, caffe=caffe)
    config = _configuration(state, caffe=caffe, id2label=id2label)
    model = CondInstForInstanceSegmentation(config)
    expected = model.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(expected.keys() - state.keys() - counters),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape],
    }
    found = [f"{kind}: {', '.join(names[:8])} ({len(names)})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"not a complete CondInst; {'; '.join(found)}")
    model.load_state_dict(state, strict=False)
    return model.eval()


def _configuration(state: Mapping[str, Tensor], *, caffe: bool, id2label: Mapping[int, str] | None) -> CondInstConfig:
    blocks = {int(m[1]) for name in state if (m := re.match(rf"{re.escape(_BACKBONE)}encoder\.stages\.2\.layers\.(\d+)\.", name))}
    if len(blocks) not in _DEPTHS:
        raise ValueError(f"expected a ResNet-50 or -101, got {len(blocks)} blocks in its third stage")
    num_classes, feature_size = state["class_predictor.weight"].shape[:2]
    mask_channels, mask_feature_size = state["mask_branch.out.weight"].shape[:2]
    resnet = {"model_type": "resnet", "depths": _DEPTHS[len(blocks)], "out_features": ["stage2", "stage3", "stage4"]}
    labels: Any = id2label or {label: f"LABEL_{label}" for label in range(num_classes)}
    return CondInstConfig(
        backbone_config={**resnet, "downsample_in_bottleneck": caffe},
        feature_size=feature_size,
        num_tower_layers=sum(bool(re.match(r"head\.class_tower\.\d+\.weight", name)) for name in state) // 2,
        mask_feature_size=mask_feature_size,
        num_mask_layers=sum(bool(re.match(r"mask_branch\.tower\.\d+\.0\.weight", name)) for name in state),
        mask_channels=mask_channels,
        dynamic_channels=hidden_channels(state["head.controller.weight"].shape[0], mask_channels),
        mask_norm="batch",
        id2label=dict(labels),
        label2id={name: label for label, name in labels.items()},
    )
