"""The necks: a feature pyramid P3 to P7 from the backbone's maps at strides 8, 16 and 32.

FPN: Lin et al., CVPR 2017, with P6 and P7 from P5 as FCOS has them (torchvision's). BiFPN: EfficientDet, CVPR 2020, Sec. 3.

Shape letters: B images, C channels, H and W rows and columns of a map.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from transformers.modeling_layers import GradientCheckpointingLayer

from ..sim.group_norm import SIMGroupNorm

NUM_LEVELS = 5
_EPSILON = 1e-4


def num_groups(num_channels: int) -> int:
    """Of a group norm: 32 as usual, fewer in a small network, where two channels are a group: P7 may be one cell."""
    return next(
        groups for groups in (32, 16, 8, 4, 2, 1) if num_channels % groups == 0 and (num_channels >= 2 * groups or groups == 1)
    )


class FPN(nn.Module):
    def __init__(self, in_channels: Sequence[int], num_channels: int) -> None:
        super().__init__()
        more = LastLevelP6P7(num_channels, num_channels)  # of equal channels: both from P5
        self.pyramid = FeaturePyramidNetwork(list(in_channels), num_channels, extra_blocks=more)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return list(self.pyramid(OrderedDict((str(level), x) for level, x in enumerate(maps))).values())


class BiFPN(nn.Module):
    """Maps of the backbone to `num_channels`, P6 and P7 from the last one, then `num_layers` layers of fusion."""

    def __init__(self, in_channels: Sequence[int], num_channels: int, num_layers: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, num_channels, 1), SIMGroupNorm(num_groups(num_channels), num_channels))
            for channels in in_channels
        )
        self.layers = nn.ModuleList(BiFPNLayer(num_channels) for _ in range(num_layers))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        while len(levels) < NUM_LEVELS:
            levels.append(_half(levels[-1]))
        for layer in self.layers:
            levels = layer(levels)
        return levels


class BiFPNLayer(GradientCheckpointingLayer):
    """Down the pyramid and up again; a map's inputs are added with learned weights (fast normalised fusion)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.down_weights = nn.Parameter(torch.ones(NUM_LEVELS - 1, 2))
        self.up_weights = nn.Parameter(torch.ones(NUM_LEVELS - 1, 3))
        self.down_convolutions = nn.ModuleList(SeparableConvolution(num_channels) for _ in range(NUM_LEVELS - 1))
        self.up_convolutions = nn.ModuleList(SeparableConvolution(num_channels) for _ in range(NUM_LEVELS - 1))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        down_weights, up_weights = (_normalized(weights) for weights in (self.down_weights, self.up_weights))
        middle = list(levels)
        for level in range(NUM_LEVELS - 2, -1, -1):
            above = nn.functional.interpolate(middle[level + 1], size=levels[level].shape[-2:], mode="nearest")
            middle[level] = self.down_convolutions[level](_weighted(down_weights[level], levels[level], above))
        fused = [middle[0]]
        for level in range(1, NUM_LEVELS):
            # The top has no map in the middle of its own: its input counts with both weights.
            inputs = (levels[level], middle[level], _half(fused[-1]))
            fused.append(self.up_convolutions[level - 1](_weighted(up_weights[level - 1], *inputs)))
        return fused


class SeparableConvolution(nn.Module):
    """SiLU, a 3x3 convolution of each channel, a 1x1 of all, and the norm. GroupNorm where EfficientDet has BatchNorm: what an
    image gives must not depend on the others of its batch."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(num_channels, num_channels, 3, padding=1, groups=num_channels, bias=False)
        self.pointwise = nn.Conv2d(num_channels, num_channels, 1)
        self.norm = SIMGroupNorm(num_groups(num_channels), num_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.pointwise(self.depthwise(nn.functional.silu(x_BCHW))))


def _half(x_BCHW: Tensor) -> Tensor:
    """Rows and columns halved and rounded up, as a convolution of stride 2 does."""
    return nn.functional.max_pool2d(x_BCHW, 3, stride=2, padding=1)


def _normalized(weights_LI: Tensor) -> Tensor:
    positive_LI = weights_LI.relu()
    return positive_LI / (positive_LI.sum(1, keepdim=True) + _EPSILON)


def _weighted(weights_I: Tensor, *inputs: Tensor) -> Tensor:
    return torch.stack([weight * x for weight, x in zip(weights_I, inputs, strict=True)]).sum(0)
