"""DCNv2 (arXiv 1811.11168) in a ResNet: 3x3 convolutions that choose where they look.

The weights keep their names, so ImageNet weights load as into the plain network; until the offsets have learned something it is
the plain network.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Conv2d):
    """A convolution whose taps are moved and weighed by what `offset` (a plain convolution, zero at first) sees there."""

    offset: nn.Conv2d

    @classmethod
    def of(cls, plain: nn.Conv2d) -> DeformableConv2d:
        """With the sizes of `plain`."""
        if plain.groups != 1:
            raise ValueError(f"expected a convolution of one group, got {plain.groups}")
        sizes: Any = (plain.kernel_size, plain.stride, plain.padding, plain.dilation)
        convolution = cls(plain.in_channels, plain.out_channels, *sizes, bias=plain.bias is not None)
        convolution.offset = nn.Conv2d(plain.in_channels, 3 * convolution.num_taps, *sizes)
        nn.init.zeros_(convolution.offset.weight)
        nn.init.zeros_(cast(Tensor, convolution.offset.bias))
        # Or transformers would draw it at random with the rest of the ResNet.
        convolution.offset._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        return convolution

    def forward(self, input: Tensor) -> Tensor:
        offsets_x2, modulation = self.offset(input).split([2 * self.num_taps, self.num_taps], dim=1)
        # Twice the sigmoid, where the paper has once: 1 at first, so that pretrained weights mean what they meant.
        modulation = 2 * modulation.sigmoid()
        # In float32, as torchvision's autocast has it on a GPU: its kernels know no bfloat16.
        image, offsets, weight, mask = (x.float().contiguous() for x in (input, offsets_x2, self.weight, modulation))
        output = deform_conv2d(
            image,
            offsets,
            weight,
            None if self.bias is None else self.bias.float(),
            stride=_pair(self.stride),
            padding=_pair(self.padding),
            dilation=_pair(self.dilation),
            mask=mask,
        )
        return output.to(input.dtype)

    @property
    def num_taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]


def _pair(sides: Any) -> tuple[int, int]:
    """torch types the two numbers of a Conv2d as any number of them."""
    first, second = sides
    return first, second


def make_deformable(resnet: nn.Module, stages: tuple[int, ...] = (1, 2, 3)) -> int:
    """Replace the 3x3 convolutions of these stages of a transformers ResNet -> how many."""
    replaced = 0
    for stage in stages:
        for module in list(resnet.get_submodule(f"encoder.stages.{stage}").modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Conv2d) and not isinstance(module, DeformableConv2d) and child.kernel_size == (3, 3):
                    convolution = DeformableConv2d.of(child)
                    with torch.no_grad():
                        convolution.weight.copy_(child.weight)
                    setattr(module, name, convolution)
                    replaced += 1
    return replaced
