"""From the class and mask logits of one image to instances at the image's own size.

The mask grid covers the padded input; an image covers the cells up to its input size divided by the stride, which need not
be whole. A pixel of the original image therefore reads the grid at ((y + 0.5) * input / original) / stride - 0.5,
bilinearly, and only from cells that hold some of the image. Shape letters: Q queries, K classes, N instances, H and W rows
and columns of the original image, h and w of the image's part of the mask grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EPSILON = 1e-6


def image_instances(
    class_logits_QK: Tensor,
    mask_logits_Qhw: Tensor,
    *,
    original_size: tuple[int, int],
    input_size: tuple[int, int],
    stride: int,
    threshold: float,
    mask_threshold: float,
    max_instances: int,
) -> dict[str, Tensor]:
    """The instances of one image, best first -> scores (N,), labels (N,), boxes (N, 4) xyxy, masks (N, H, W) bool."""
    if not 0.0 < mask_threshold < 1.0:
        raise ValueError(f"mask_threshold must lie between 0 and 1, got {mask_threshold}")
    rows, columns = (math.ceil(length / stride) for length in input_size)
    if rows > mask_logits_Qhw.shape[1] or columns > mask_logits_Qhw.shape[2]:
        raise ValueError(
            f"an input of {input_size} needs {rows} x {columns} mask cells at stride {stride}, but the masks have only"
            f" {tuple(mask_logits_Qhw.shape[1:])}: are these the sizes of this batch?"
        )
    cut = math.log(mask_threshold / (1 - mask_threshold))
    mask_logits_Qhw = mask_logits_Qhw[:, :rows, :columns]
    scores_QK = class_logits_QK.softmax(-1)[:, :-1] * _mask_scores(mask_logits_Qhw, cut)[:, None]
    num_classes = scores_QK.shape[1]
    scores_N, index_N = scores_QK.flatten().topk(min(max_instances, scores_QK.numel()))
    keep_N = (scores_N >= threshold) & (scores_N > 0)
    scores_N, index_N = scores_N[keep_N], index_N[keep_N]
    query_N = torch.div(index_N, num_classes, rounding_mode="floor")

    y_axis = _sampling_axis(original_size[0], input_size[0], stride, rows, mask_logits_Qhw.device)
    x_axis = _sampling_axis(original_size[1], input_size[1], stride, columns, mask_logits_Qhw.device)
    masks_NHW, boxes_N4 = _full_size_masks(mask_logits_Qhw[query_N], y_axis, x_axis, cut)
    present_N = boxes_N4[:, 2] > 0
    return {
        "scores": scores_N[present_N],
        "labels": (index_N % num_classes)[present_N],
        "boxes": boxes_N4[present_N],
        "masks": masks_NHW if bool(present_N.all()) else masks_NHW[present_N],
    }


def _mask_scores(mask_logits_Qhw: Tensor, cut: float) -> Tensor:
    """Mean mask probability inside each mask -> (Q,); 0 for an empty one."""
    inside_Qhw = mask_logits_Qhw > cut
    total_Q = (mask_logits_Qhw.sigmoid() * inside_Qhw).sum((1, 2))
    return total_Q / (inside_Qhw.sum((1, 2)) + _EPSILON)


@dataclass
class _SamplingAxis:
    """Per output position along one axis: the two cells between which it lies, and the weight of the second."""

    low: Tensor
    high: Tensor
    weight: Tensor

    def span(self, first_cell: int, last_cell: int) -> slice:
        """The output positions that touch any cell from `first_cell` to `last_cell`."""
        start = int(torch.searchsorted(self.high, first_cell))
        stop = int(torch.searchsorted(self.low, last_cell, right=True))
        return slice(start, stop)


def _sampling_axis(length: int, input_length: int, stride: int, num_cells: int, device: torch.device) -> _SamplingAxis:
    pixel = torch.arange(length, device=device, dtype=torch.float64)
    position = ((pixel + 0.5) * (input_length / length) / stride - 0.5).clamp(0, num_cells - 1)
    low = position.floor().long()
    return _SamplingAxis(low, (low + 1).clamp(max=num_cells - 1), (position - low).float())


def _full_size_masks(mask_logits_Nhw: Tensor, y_axis: _SamplingAxis, x_axis: _SamplingAxis, cut: float) -> tuple[Tensor, Tensor]:
    """Masks at the original size (N, H, W) bool, and their tight boxes (N, 4), zeros for an empty mask.

    A bilinear value exceeds the cut only next to a cell that does, so each mask is made inside the span of its cells.
    """
    device = mask_logits_Nhw.device
    masks_NHW = torch.zeros(len(mask_logits_Nhw), len(y_axis.low), len(x_axis.low), dtype=torch.bool, device=device)
    boxes = torch.zeros(len(mask_logits_Nhw), 4)
    cells_Nhw = mask_logits_Nhw > cut
    row_spans, column_spans = _spans(cells_Nhw.any(2)), _spans(cells_Nhw.any(1))
    for index, (row_span, column_span) in enumerate(zip(row_spans, column_spans, strict=True)):
        if row_span is None or column_span is None:
            continue
        y, x = y_axis.span(*row_span), x_axis.span(*column_span)
        if y.start >= y.stop or x.start >= x.stop:  # an image smaller than its mask grid may read none of the cells
            continue
        logits_hw = mask_logits_Nhw[index]
        logits_Hw = torch.lerp(logits_hw[y_axis.low[y]], logits_hw[y_axis.high[y]], y_axis.weight[y][:, None])
        logits_HW = torch.lerp(logits_Hw[:, x_axis.low[x]], logits_Hw[:, x_axis.high[x]], x_axis.weight[x])
        mask_HW = logits_HW > cut
        masks_NHW[index, y, x] = mask_HW
        (rows,), (columns,) = _spans(mask_HW.any(1)[None]), _spans(mask_HW.any(0)[None])
        if rows is not None and columns is not None:
            left, top, right, bottom = columns[0], rows[0], columns[1] + 1, rows[1] + 1
            boxes[index] = torch.tensor([x.start + left, y.start + top, x.start + right, y.start + bottom])
    return masks_NHW, boxes.to(device)


def _spans(occupied_NL: Tensor) -> list[tuple[int, int] | None]:
    """First and last occupied place of each row, None for an empty row."""
    length = occupied_NL.shape[1]
    places = torch.arange(length, device=occupied_NL.device)
    first = torch.where(occupied_NL, places, length).amin(1).tolist()
    last = torch.where(occupied_NL, places, -1).amax(1).tolist()
    return [None if high < 0 else (low, high) for low, high in zip(first, last, strict=True)]
