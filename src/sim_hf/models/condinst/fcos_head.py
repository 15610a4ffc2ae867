"""FCOS's head with CondInst's controller, one set of weights for all levels: at every location classes, a box, centerness and
the weights of a mask head.

Shape letters: B images, C channels, K classes, P numbers of a controller, M locations of all levels, H W of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..sim.group_norm import SIMGroupNorm
from .feature_pyramid import num_groups

PRIOR_PROBABILITY = 0.01  # of a class at a location, at first (focal loss, Sec. 4.1)
FIRST_DISTANCE = 4.0  # strides to each side of a box, at first: at 0 half of all distances would start without a gradient


@dataclass
class DensePredictions:
    """class_logits_BMK; box_distances_BM4: left, top, right, bottom in input pixels, at least 0; centerness_logits_BM;
    controllers_BMP. Level by level, row by row."""

    class_logits_BMK: Tensor
    box_distances_BM4: Tensor
    centerness_logits_BM: Tensor
    controllers_BMP: Tensor


class Tower(GradientCheckpointingLayer, nn.Sequential):
    """Convolutions with group norm and ReLU. What it computes for a level may be computed again (activation checkpointing)."""

    def __init__(self, num_channels: int, num_layers: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(num_layers):
            layers += [
                nn.Conv2d(num_channels, num_channels, 3, padding=1),
                SIMGroupNorm(num_groups(num_channels), num_channels),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input)
        return input


class ClassPredictor(nn.Conv2d):
    """What reads the class tower: a filter for each class."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__(num_channels, num_classes, 3, padding=1)


class FCOSHead(nn.Module):
    """Towers, and what reads them; the class head `class_predictor` is the model's own and given to `forward`."""

    def __init__(self, num_channels: int, num_layers: int, num_controls: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.class_tower = Tower(num_channels, num_layers)
        self.box_tower = Tower(num_channels, num_layers)
        self.box_predictor = nn.Conv2d(num_channels, 4, 3, padding=1)
        self.centerness_predictor = nn.Conv2d(num_channels, 1, 3, padding=1)
        self.controller = nn.Conv2d(num_channels, num_controls, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))

    def forward(self, levels: Sequence[Tensor], class_predictor: nn.Conv2d) -> DensePredictions:
        classes, distances, centerness, controllers = [], [], [], []
        for x_BCHW, stride, scale in zip(levels, self.strides, self.scales, strict=True):
            classes.append(_flat(class_predictor(self.class_tower(x_BCHW))))
            boxes_BCHW = self.box_tower(x_BCHW)
            distances.append(_flat(self.box_predictor(boxes_BCHW) * scale).float().relu() * stride)
            centerness.append(_flat(self.centerness_predictor(boxes_BCHW))[..., 0])
            controllers.append(_flat(self.controller(boxes_BCHW)))
        return DensePredictions(*(torch.cat(parts, 1) for parts in (classes, distances, centerness, controllers)))


def _flat(x_BCHW: Tensor) -> Tensor:
    """(B, H W, C)"""
    return x_BCHW.flatten(2).transpose(1, 2)


def level_sizes(input_size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, columns) of each level: a convolution of stride 2 rounds up."""
    return [(-(-input_size[0] // stride), -(-input_size[1] // stride)) for stride in strides]


def level_locations(input_size: tuple[int, int], strides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres (x, y) of all cells in input pixels -> (M, 2) float32, and each one's level (M,)"""
    centres, levels = [], []
    for level, (stride, (height, width)) in enumerate(zip(strides, level_sizes(input_size, strides), strict=True)):
        y_H, x_W = ((torch.arange(length, device=device) + 0.5) * stride for length in (height, width))
        y_HW, x_HW = torch.meshgrid(y_H, x_W, indexing="ij")
        centres.append(torch.stack([x_HW, y_HW], -1).flatten(0, 1))
        levels.append(torch.full((height * width,), level, device=device))
    return torch.cat(centres), torch.cat(levels)
