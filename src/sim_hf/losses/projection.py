"""Projection term of BoxInst (Tian et al. 2021), the first box supervision that SIM keeps.

A mask and its box have the same shadow on the y axis and on the x axis. The loss compares the shadows, so it says how
far the mask must reach and nothing about its shape inside the box.

Shape letters: N predictions assigned to an instance, Q queries, G annotated instances, M pixels that are the largest of
their row or column, H and W rows and columns of the grid, L either of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sim_hf.losses.precision import at_least_float32, autocast_disabled
from sim_hf.structures import rasterize_boxes

SMALL_BOX = 6  # cells: rounding may move each edge by half a cell, a twelfth of such a side
DICE_EPSILON = 1e-5  # BoxInst: keeps 0/0 away, added to the denominator only


def box_projections(
    boxes_G4: Tensor, height: int, width: int, stride: float, *, whole_cells: bool = False
) -> tuple[Tensor, Tensor]:
    """Shadows of the boxes (xyxy, input pixels) on a grid of the given stride -> rows (G, height), columns (G, width).

    The shadow of a small box (below `SMALL_BOX` cells a side, sqrt(width * height)) is the share of each row or column of cells
    that it covers: where it ends within a cell, the mask shall be undecided there, and its edge, read between the cells, lies
    where the box ends. Larger boxes, for which half a cell is little, and all boxes with `whole_cells`, as in BoxInst and SIM,
    have 0 and 1. So has a side of less than two cells, which may cover no cell wholly: no mask has to be undecided everywhere.

    Examples:
        >>> rows, columns = box_projections(torch.tensor([[4.0, 1.0, 16.0, 11.0]]), height=4, width=4, stride=4)
        >>> rows.tolist(), columns.tolist()
        ([[0.75, 1.0, 0.75, 0.0]], [[0.0, 1.0, 1.0, 1.0]])
    """
    rows_GH, columns_GW = (cells.float() for cells in rasterize_boxes(boxes_G4, height, width, stride))
    if whole_cells:
        return rows_GH, columns_GW
    x1, y1, x2, y2 = (boxes_G4 / stride).unbind(-1)
    is_small_G = (x2 - x1) * (y2 - y1) < SMALL_BOX**2
    return _shares_of_lines(y1, y2, rows_GH, is_small_G), _shares_of_lines(x1, x2, columns_GW, is_small_G)


def _shares_of_lines(low_G: Tensor, high_G: Tensor, cells_GL: Tensor, is_small_G: Tensor) -> Tensor:
    """Share of each cell that lies between low and high (in cells), for small boxes; else, or where these are less than two cells
    apart, `cells_GL`."""
    first_L = torch.arange(cells_GL.shape[1], device=cells_GL.device)
    shares_GL = (torch.minimum(high_G[:, None], first_L + 1) - torch.maximum(low_G[:, None], first_L)).clamp(0, 1)
    return torch.where((is_small_G & (high_G - low_G >= 2))[:, None], shares_GL, cells_GL)


def projection_loss(mask_logits_NHW: Tensor, rows_NH: Tensor, columns_NW: Tensor) -> Tensor:
    """Dice loss between the shadows of mask and box, summed over the two axes -> (N,) in 0..2.

    `rows_NH` and `columns_NW` are `box_projections` of the instance of each row.

    Examples:
        >>> rows, columns = box_projections(torch.tensor([[4.0, 4.0, 12.0, 8.0]]), height=4, width=4, stride=4)
        >>> rows.tolist(), columns.tolist()
        ([[0.0, 1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 0.0]])
        >>> mask_logits = torch.full((1, 4, 4), -20.0)  # nothing: its shadows are empty
        >>> round(projection_loss(mask_logits, rows, columns).item(), 3)
        2.0
        >>> mask_logits[0, 1, 1:3] = 20.0  # what reaches from side to side of the box casts its shadows
        >>> round(projection_loss(mask_logits, rows, columns).item(), 3)
        0.0
    """
    num_rows, height, width = mask_logits_NHW.shape
    _check_shadows(rows_NH, columns_NW, (num_rows, height), (num_rows, width))
    losses = [
        _dice_loss(probabilities_NL, at_least_float32(shadow_NL))
        for probabilities_NL, shadow_NL in zip(_mask_shadows(mask_logits_NHW), (rows_NH, columns_NW), strict=True)
    ]
    return losses[0] + losses[1]


@torch.no_grad()
def projection_cost(mask_logits_QHW: Tensor, rows_GH: Tensor, columns_GW: Tensor) -> Tensor:
    """`projection_loss` of every query with every instance, for matching without masks -> (Q, G) in 0..2.

    Dice needs only the products of the one-dimensional shadows: two matrix products, nothing of size (Q, G, H).
    """
    _, height, width = mask_logits_QHW.shape
    num_instances = rows_GH.shape[0]
    _check_shadows(rows_GH, columns_GW, (num_instances, height), (num_instances, width))
    costs = []
    with autocast_disabled(mask_logits_QHW):
        for probabilities_QL, shadow_GL in zip(_mask_shadows(mask_logits_QHW), (rows_GH, columns_GW), strict=True):
            shadow_GL = shadow_GL.to(probabilities_QL.dtype)
            overlap_QG = probabilities_QL @ shadow_GL.T
            sizes_QG = probabilities_QL.square().sum(-1)[:, None] + shadow_GL.square().sum(-1)[None, :]
            costs.append(1 - 2 * overlap_QG / (sizes_QG + DICE_EPSILON))
    return costs[0] + costs[1]


def _mask_shadows(mask_logits_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column maxima of the mask probability -> (N, H), (N, W).

    The maximum of the logits first and the sigmoid after: same value, H + W sigmoids instead of H * W.
    """
    rows_NH, columns_NW = _Maxima.apply(mask_logits_NHW)
    return at_least_float32(rows_NH).sigmoid(), at_least_float32(columns_NW).sigmoid()


class _Maxima(torch.autograd.Function):
    """`amax` along both axes, whose gradient touches the maxima only -> (N, H), (N, W).

    Equal maxima share the gradient, so a flat mask moves as a whole and no device picks its own winner.
    """

    @staticmethod
    def forward(ctx, mask_logits_NHW):
        rows_NH, columns_NW = mask_logits_NHW.amax(-1), mask_logits_NHW.amax(-2)
        ctx.save_for_backward(mask_logits_NHW, rows_NH, columns_NW)
        return rows_NH, columns_NW

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows_NH, grad_columns_NW):
        mask_logits_NHW, rows_NH, columns_NW = ctx.saved_tensors
        _, height, width = mask_logits_NHW.shape
        # One comparison for both: nothing is above its row's or its column's maximum, so it reaches the lower one or none.
        lower_NHW = torch.minimum(rows_NH[:, :, None], columns_NW[:, None, :])
        places_M = (mask_logits_NHW >= lower_NHW).flatten().nonzero()[:, 0]
        rows_M = places_M // width  # of all N * H
        columns_M = rows_M // height * width + places_M % width  # of all N * W
        logits_M = mask_logits_NHW.reshape(-1).index_select(0, places_M)
        shares_M = _shares(logits_M, rows_NH, grad_rows_NH, rows_M) + _shares(logits_M, columns_NW, grad_columns_NW, columns_M)
        return torch.zeros_like(mask_logits_NHW).reshape(-1).index_copy_(0, places_M, shares_M).view_as(mask_logits_NHW)


def _shares(logits_M: Tensor, maxima_NL: Tensor, grad_NL: Tensor, line_M: Tensor) -> Tensor:
    """What each pixel gets of the gradient of its line's maximum -> (M,). line_M: which of all N * L lines."""
    is_maximum_M = logits_M == maxima_NL.flatten().index_select(0, line_M)
    # Counted in float32: a sum of ones ends at 256 in bfloat16.
    ties = torch.zeros(grad_NL.numel(), device=grad_NL.device).index_add_(0, line_M, is_maximum_M.float())
    return torch.where(is_maximum_M, (grad_NL.flatten() / ties.to(grad_NL.dtype)).index_select(0, line_M), 0)


def _dice_loss(probabilities_NL: Tensor, target_NL: Tensor) -> Tensor:
    """1 - 2 sum(p t) / (sum(p^2) + sum(t^2)) -> (N,)."""
    overlap_N = (probabilities_NL * target_NL).sum(-1)
    sizes_N = probabilities_NL.square().sum(-1) + target_NL.square().sum(-1)
    return 1 - 2 * overlap_N / (sizes_N + DICE_EPSILON)


def _check_shadows(rows_GH: Tensor, columns_GW: Tensor, rows_shape: tuple[int, int], columns_shape: tuple[int, int]) -> None:
    if tuple(rows_GH.shape) != rows_shape or tuple(columns_GW.shape) != columns_shape:
        raise ValueError(
            f"expected box rows {rows_shape} and columns {columns_shape}, "
            f"got {tuple(rows_GH.shape)} and {tuple(columns_GW.shape)}"
        )
