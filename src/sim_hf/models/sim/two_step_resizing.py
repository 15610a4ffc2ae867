"""A part of the mask grid at the image's own size: exactly what resizing the whole grid twice would give there.

Mask2Former resizes logits twice, bilinearly: from the mask grid to the padded input, of which the image's part is cut out, and
from that to the original image. Both steps are linear along one axis after the other, so any part of the result needs only
the cells below it. An axis here is one of the two, with both steps on it; weights are float32 numbers made as torch's
`interpolate` makes them, so masks are the same pixel by pixel. The first step reads only cells that hold some of the image.

Shape letters: L cells or pixels along the axis, M everything beside it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class _Step:
    """A linear resize of an axis: output p lies between the places `low[p]` and `high[p]`, with the share `weight[p]` of the
    second. scale: input places per output place. num_places: how many of the input may be read."""

    def __init__(self, length: int, scale: np.float32, num_places: int, device: torch.device) -> None:
        half = np.float32(0.5)
        position = np.clip(scale * (np.arange(length, dtype=np.float32) + half) - half, 0, num_places - 1)
        self.low = np.floor(position).astype(np.int64)
        self.high = np.minimum(self.low + 1, num_places - 1)
        self._places = torch.from_numpy(np.stack([self.low, self.high])).to(device)
        self._weight_L1 = torch.from_numpy(position - self.low.astype(np.float32)).to(device)[:, None]

    def outputs(self, first: int, stop: int) -> tuple[int, int]:
        """The range of outputs that read any of the places `first` to `stop` - 1."""
        return int(np.searchsorted(self.high, first)), int(np.searchsorted(self.low, stop - 1, side="right"))

    def places(self, first: int, stop: int) -> tuple[int, int]:
        """The range of places that the outputs `first` to `stop` - 1 read."""
        return int(self.low[first]), int(self.high[stop - 1]) + 1

    def apply(self, values_LM: Tensor, first: int, stop: int, origin: int) -> Tensor:
        """Outputs `first` to `stop` - 1 of values that begin with place `origin`."""
        low_L, high_L = self._places[:, first:stop] - origin
        return torch.lerp(values_LM.index_select(0, low_L), values_LM.index_select(0, high_L), self._weight_L1[first:stop])


class TwoStepAxis:
    """Mask cells to pixels of the padded input (`stride` a cell), and these to pixels of the original image."""

    def __init__(self, original_length: int, input_length: int, stride: int, device: torch.device) -> None:
        self.num_cells = math.ceil(input_length / stride)
        self._steps = [_Step(input_length, np.float32(1 / stride), self.num_cells, device)]
        if original_length != input_length:
            scale = np.float32(input_length) / np.float32(original_length)
            self._steps.append(_Step(original_length, scale, input_length, device))

    def pixels(self, first_cell: int, stop_cell: int) -> tuple[int, int]:
        """The range of the image's pixels that read any of these cells."""
        span = first_cell, stop_cell
        for step in self._steps:
            span = step.outputs(*span)
            if span[0] >= span[1]:  # an image smaller than its mask grid may read none of the cells
                break
        return span

    def cells(self, first_pixel: int, stop_pixel: int) -> tuple[int, int]:
        """The range of cells that these pixels read."""
        span = first_pixel, stop_pixel
        for step in reversed(self._steps):
            span = step.places(*span)
        return span

    def resize(self, values_LM: Tensor, first_pixel: int, stop_pixel: int) -> Tensor:
        """The cells `cells(...)` of these pixels, along the first dimension -> the pixels."""
        spans = [(first_pixel, stop_pixel)]
        for step in reversed(self._steps):
            spans.append(step.places(*spans[-1]))
        spans.reverse()
        for step, (origin, _), (first, stop) in zip(self._steps, spans[:-1], spans[1:], strict=True):
            values_LM = step.apply(values_LM, first, stop, origin)
        return values_LM
