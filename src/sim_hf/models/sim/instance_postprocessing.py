"""From the class and mask logits of one image to instances at the image's own size, each mask kept as the part in its box.

A mask is made at full resolution only where its cells are: nothing of the image's size exists per instance, which is most of
the time and of the memory of the usual way. Shape letters: Q queries, K classes, N instances, H and W rows and columns of the
original image, h and w of the image's part of the mask grid, T and S rows and columns of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mask_parts import Span, main_parts
from .two_step_resizing import TwoStepAxis

_EPSILON = 1e-6


@dataclass(frozen=True)
class ImageGeometry:
    """Sizes are (height, width): of the image before resizing, and of the network's input before padding."""

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    stride: int

    def axes(self, grid_size: Sequence[int], device: torch.device) -> tuple[TwoStepAxis, TwoStepAxis]:
        """Of rows and columns. A mask grid that is too small for them is of another batch."""
        y_axis, x_axis = (
            TwoStepAxis(original, resized, self.stride, device)
            for original, resized in zip(self.original_size, self.input_size, strict=True)
        )
        if y_axis.num_cells > grid_size[0] or x_axis.num_cells > grid_size[1]:
            raise ValueError(
                f"an input of {self.input_size} needs {y_axis.num_cells} x {x_axis.num_cells} mask cells at stride"
                f" {self.stride}, but the masks have only {tuple(grid_size)}: are these the sizes of this batch?"
            )
        return y_axis, x_axis


def image_instances(
    class_logits_QK: Tensor,
    mask_logits_Qhw: Tensor,
    geometry: ImageGeometry,
    *,
    threshold: float,
    mask_threshold: float,
    max_instances: int,
    soft_nms_sigma: float = 0.0,
    max_part_gap: float | None = None,
) -> dict[str, Any]:
    """The instances of one image, best first -> `scores` (N,), `labels` (N,), `boxes` (N, 4) xyxy on the device of the logits,
    and on the CPU `corners` (N, 2) and `crops`, N masks (S, T) bool. A crop is what lies in a mask's box, column by column,
    as run lengths go; its first pixel is in column and row `corners`. Instances of one query share a crop. soft_nms_sigma:
    above 0, of two instances of a class with much the same mask the worse one loses score (`soft_nms`). max_part_gap: a mask
    loses the parts that are further from its main one than this, times the square root of its area (`main_parts`)."""
    if not 0.0 < mask_threshold < 1.0:
        raise ValueError(f"mask_threshold must lie between 0 and 1, got {mask_threshold}")
    cut = math.log(mask_threshold / (1 - mask_threshold))
    y_axis, x_axis = geometry.axes(mask_logits_Qhw.shape[1:], mask_logits_Qhw.device)
    probabilities_QK = class_logits_QK.softmax(-1)[:, :-1]
    # The score of a mask is at most 1: where no class reaches the threshold, the mask need not be looked at.
    possible_Q = (probabilities_QK >= threshold).any(1)
    if not bool(possible_Q.all()):
        probabilities_QK, mask_logits_Qhw = probabilities_QK[possible_Q], mask_logits_Qhw[possible_Q]
    mask_logits_Qhw = mask_logits_Qhw[:, : y_axis.num_cells, : x_axis.num_cells]
    spans = _cell_spans(mask_logits_Qhw, cut)
    if max_part_gap is not None:
        mask_logits_Qhw, spans = main_parts(mask_logits_Qhw, spans, cut, max_part_gap)
    scores_QK = probabilities_QK * _mask_scores(mask_logits_Qhw, spans, cut)[:, None]
    scores_N, index_N = scores_QK.flatten().topk(min(max_instances, scores_QK.numel()))
    keep_N = (scores_N >= threshold) & (scores_N > 0)
    scores_N, index_N = scores_N[keep_N], index_N[keep_N]
    num_classes = probabilities_QK.shape[1]
    queries_N = torch.div(index_N, num_classes, rounding_mode="floor")
    if soft_nms_sigma > 0 and len(scores_N) > 1:
        overlap_NN = mask_overlap(mask_logits_Qhw, queries_N, cut)
        scores_N = soft_nms(scores_N, index_N % num_classes, overlap_NN, soft_nms_sigma)
        scores_N, order_N = scores_N.sort(descending=True, stable=True)
        order_N = order_N[(scores_N >= threshold) & (scores_N > 0)]
        scores_N, index_N, queries_N = scores_N[: len(order_N)], index_N[order_N], queries_N[order_N]
    queries = queries_N.tolist()
    pieces = {query: _Piece.resized(mask_logits_Qhw[query], spans[query], y_axis, x_axis, cut) for query in set(queries)}
    crops = _tight_crops(pieces)
    present = [position for position, query in enumerate(queries) if query in crops]
    found = [crops[queries[position]] for position in present]
    boxes_N4 = torch.tensor([crop.box() for crop in found], dtype=torch.float32).reshape(-1, 4)
    return {
        "scores": scores_N[present],
        "labels": (index_N % num_classes)[present],
        "boxes": boxes_N4.to(mask_logits_Qhw.device),
        "corners": boxes_N4[:, :2].long(),
        "crops": [crop.mask_ST for crop in found],
    }


def mask_overlap(mask_logits_Qhw: Tensor, queries_N: Tensor, cut: float = 0.0) -> Tensor:
    """IoU on the mask grid (logits above the cut) of every two instances; queries_N says whose mask is whose -> (N, N)."""
    queries_U, place_N = queries_N.unique(return_inverse=True)
    masks_UP = (mask_logits_Qhw[queries_U] > cut).flatten(1).float()
    both_UU, area_U = masks_UP @ masks_UP.T, masks_UP.sum(1)
    overlap_UU = both_UU / (area_U[:, None] + area_U - both_UU).clamp(min=1)
    return overlap_UU[place_N][:, place_N]


def soft_nms(scores_N: Tensor, labels_N: Tensor, overlap_NN: Tensor, sigma: float) -> Tensor:
    """Scores after Gaussian Soft-NMS (arXiv 1704.04503), with masks in place of boxes: from the best instance down, each
    multiplies the scores of the worse ones of its class by exp(-IoU^2 / sigma) -> (N,). Many of them may take one to 0."""
    same_NN = labels_N[:, None] == labels_N
    factor_NN = torch.where(same_NN, (-(overlap_NN**2) / sigma).exp(), 1.0).cpu().numpy()  # one transfer, then a short loop
    scores, waiting = scores_N.cpu().numpy().copy(), np.ones(len(scores_N), dtype=bool)
    for _ in range(len(scores)):
        best = int(np.where(waiting, scores, -1.0).argmax())
        waiting[best] = False
        scores[waiting] *= factor_NN[best, waiting]
    return torch.from_numpy(scores).to(scores_N.device)


def full_masks(instances: dict[str, Any], size: tuple[int, int]) -> Tensor:
    """Crops and corners of `image_instances` -> masks (N, H, W) bool on the device of the scores."""
    crops: list[Tensor] = instances["crops"]
    masks_NHW = torch.zeros(len(crops), *size, dtype=torch.bool, device=instances["scores"].device)
    for mask_HW, crop_ST, (left, top) in zip(masks_NHW, crops, instances["corners"].tolist(), strict=True):
        mask_HW[top : top + crop_ST.shape[1], left : left + crop_ST.shape[0]] = crop_ST.T
    return masks_NHW


def label_map(instances: dict[str, Any], size: tuple[int, int], least_visible: float) -> tuple[Tensor, list[dict[str, Any]]]:
    """One instance a pixel, as transformers' own processors give them -> ids (H, W) int32 on the CPU, -1 for none, and a record
    per id. The best instance takes a pixel; one of whose mask less than the share `least_visible` is left over is left out."""
    ids_HW = torch.full(size, -1, dtype=torch.int32)
    records: list[dict[str, Any]] = []
    scores, labels = instances["scores"].tolist(), instances["labels"].tolist()
    for score, label, crop_ST, (left, top) in zip(scores, labels, instances["crops"], instances["corners"].tolist(), strict=True):
        there_ST = ids_HW[top : top + crop_ST.shape[1], left : left + crop_ST.shape[0]].T
        visible_ST = crop_ST & (there_ST < 0)
        if visible_ST.sum() < least_visible * crop_ST.sum() or not visible_ST.any():
            continue
        there_ST[visible_ST] = len(records)
        records.append({"id": len(records), "label_id": label, "was_fused": False, "score": round(score, 6)})
    return ids_HW, records


def _cell_spans(mask_logits_Qhw: Tensor, cut: float) -> list[tuple[Span, Span] | None]:
    """Rows and columns of each mask's box on the grid, None for an empty mask.

    A linear mean exceeds the cut only where one of its cells does, so a mask lies above these cells and next to them.
    """
    if not len(mask_logits_Qhw):
        return []
    # The largest logits of rows and columns: no mask is made.
    rows_Qh, columns_Qw = (mask_logits_Qhw.amax(axis) > cut for axis in (2, 1))
    occupied_QL = torch.cat([rows_Qh, columns_Qw], 1).cpu().numpy()  # one transfer
    rows_Qh, columns_Qw = np.split(occupied_QL, [rows_Qh.shape[1]], axis=1)
    spans: list[tuple[Span, Span] | None] = []
    for row, column in zip(rows_Qh, columns_Qw, strict=True):
        rows, columns = _span(row), _span(column)
        spans.append(None if rows is None or columns is None else (rows, columns))
    return spans


def _span(occupied_L: np.ndarray) -> Span | None:
    first = int(occupied_L.argmax())
    return (first, len(occupied_L) - int(occupied_L[::-1].argmax())) if occupied_L[first] else None


def _mask_scores(mask_logits_Qhw: Tensor, spans: list[tuple[Span, Span] | None], cut: float) -> Tensor:
    """Mean mask probability inside each mask -> (Q,); 0 for an empty one."""
    nothing = mask_logits_Qhw.new_zeros(())
    scores = []
    for logits_hw, span in zip(mask_logits_Qhw, spans, strict=True):
        if span is None:
            scores.append(nothing)
            continue
        logits_hw = logits_hw[slice(*span[0]), slice(*span[1])]
        inside_hw = logits_hw > cut
        scores.append((logits_hw.sigmoid() * inside_hw).sum() / (inside_hw.sum() + _EPSILON))
    return torch.stack(scores) if scores else mask_logits_Qhw.new_zeros(0)


@dataclass
class _Piece:
    """A part of a mask, column by column, and the column and row of its first pixel."""

    mask_ST: Tensor
    left: int
    top: int

    @staticmethod
    def resized(
        logits_hw: Tensor, span: tuple[Span, Span] | None, y_axis: TwoStepAxis, x_axis: TwoStepAxis, cut: float
    ) -> _Piece | None:
        """All of a mask at the image's size, with some background; None where no pixel of the image reads its cells."""
        if span is None:
            return None
        rows, columns = y_axis.pixels(*span[0]), x_axis.pixels(*span[1])
        if rows[0] >= rows[1] or columns[0] >= columns[1]:
            return None
        logits_hw = logits_hw[slice(*y_axis.cells(*rows)), slice(*x_axis.cells(*columns))]
        logits_wT = y_axis.resize(logits_hw, *rows).T.contiguous()
        return _Piece(x_axis.resize(logits_wT, *columns) > cut, columns[0], rows[0])

    def tight(self) -> _Piece | None:
        """Without the background around it; None for an empty one."""
        mask_ST = self.mask_ST.numpy()
        columns, rows = (_span(np.asarray(mask_ST.any(axis))) for axis in (1, 0))
        if columns is None or rows is None:
            return None
        return _Piece(self.mask_ST[slice(*columns), slice(*rows)], self.left + columns[0], self.top + rows[0])

    def box(self) -> tuple[int, int, int, int]:
        width, height = self.mask_ST.shape
        return self.left, self.top, self.left + width, self.top + height


def _tight_crops(pieces: dict[int, _Piece | None]) -> dict[int, _Piece]:
    """By query, on the CPU, those that are not empty."""
    made = {query: piece for query, piece in pieces.items() if piece is not None}
    if not made:
        return {}
    flat = torch.cat([piece.mask_ST.flatten() for piece in made.values()]).cpu()  # one transfer
    parts = flat.split([piece.mask_ST.numel() for piece in made.values()])
    crops = {}
    for (query, piece), part in zip(made.items(), parts, strict=True):
        tight = _Piece(part.view(piece.mask_ST.shape), piece.left, piece.top).tight()
        if tight is not None:
            crops[query] = tight
    return crops
