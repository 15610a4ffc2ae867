"""CondInst's mask branch: one map of few channels for all instances of an image, at stride 8.

Shape letters: B images, C channels, H W of the map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..sim.group_norm import SIMGroupNorm
from .feature_pyramid import num_groups

NUM_LEVELS = 3  # P3, P4, P5


class MaskBranch(nn.Module):
    """The levels at one width, added at the finest one, and a tower over the sum."""

    def __init__(self, in_channels: int, num_channels: int, num_layers: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.refine = nn.ModuleList(_convolution(in_channels, num_channels, norm) for _ in range(NUM_LEVELS))
        self.tower = nn.Sequential(*(_convolution(num_channels, num_channels, norm) for _ in range(num_layers)))
        self.out = nn.Conv2d(num_channels, out_channels, 1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """-> what the tower gives, which is what prototypes are made of, and the mask map"""
        total, *coarser = (refine(x) for refine, x in zip(self.refine, levels, strict=False))
        for x in coarser:
            total = total + nn.functional.interpolate(x, size=total.shape[-2:], mode="bilinear", align_corners=False)
        features = self.tower(total)
        return features, self.out(features)


def _convolution(in_channels: int, num_channels: int, norm: str) -> nn.Sequential:
    norms = {"group": lambda: SIMGroupNorm(num_groups(num_channels), num_channels), "batch": lambda: nn.BatchNorm2d(num_channels)}
    convolution = nn.Conv2d(in_channels, num_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, norms[norm](), nn.ReLU(inplace=True))
