"""Multiple-instance terms of BBTP (Hsu et al. 2019, "Weakly Supervised Instance Segmentation using the Bounding Box
Tightness Prior", NeurIPS).

A tight box is touched by its object on all sides, so every row and column through the box holds a pixel of the object: a
bag of pixels of which one at least is positive. A line that misses the box holds none. What lies between is left to a
small smoothness term.

Shape letters: N predictions assigned to an instance, H and W rows and columns of the grid, L either of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sim_hf.losses.precision import at_least_float32


def tightness_loss(mask_logits_NHW: Tensor, rows_NH: Tensor, columns_NW: Tensor) -> Tensor:
    """Cross-entropy of the largest probability of each line -> (N,).

    A line through the box costs -log of its largest probability inside the box; a line that misses the box costs
    -log(1 - p) of its largest. The mean over the lines through the box plus the mean over the others (0 when there are
    none): the paper sums over the lines of a crop around the box, where the two kinds are about as many. `rows_NH` and
    `columns_NW` are `rasterize_boxes` of the instance of each row.
    """
    logits_NHW = at_least_float32(mask_logits_NHW)
    through_NH, through_NW = _lines(mask_logits_NHW, rows_NH, columns_NW)
    lowest = torch.finfo(logits_NHW.dtype).min
    crossing_NL = torch.cat(
        [
            logits_NHW.masked_fill(~through_NW[:, None, :], lowest).amax(-1),
            logits_NHW.masked_fill(~through_NH[:, :, None], lowest).amax(-2),
        ],
        dim=1,
    )
    whole_NL = torch.cat([logits_NHW.amax(-1), logits_NHW.amax(-2)], dim=1)
    through_NL = torch.cat([through_NH, through_NW], dim=1)
    # softplus(-x) = -log sigmoid(x), softplus(x) = -log(1 - sigmoid(x)). Only what counts may reach it: 0 times a huge loss
    # is no harm, but its gradient is.
    held_NL = functional.softplus(-torch.where(through_NL, crossing_NL, 0)) * _shares(through_NL, logits_NHW.dtype)
    empty_NL = functional.softplus(torch.where(through_NL, 0, whole_NL)) * _shares(~through_NL, logits_NHW.dtype)
    return (held_NL + empty_NL).sum(-1)


def smoothness_loss(mask_logits_NHW: Tensor, rows_NH: Tensor, columns_NW: Tensor) -> Tensor:
    """Squared differences of the probabilities of neighbours, of which one at least is in the box -> (N,).

    Divided by the number of lines through the box, as the mean of `tightness_loss` over those lines is: the two keep the
    ratio that the sums of the paper have.
    """
    through_NH, through_NW = _lines(mask_logits_NHW, rows_NH, columns_NW)
    mask_NHW = at_least_float32(mask_logits_NHW).sigmoid()
    inside_NHW = through_NH[:, :, None] & through_NW[:, None, :]
    below_NHW = (mask_NHW[:, 1:] - mask_NHW[:, :-1]).square() * (inside_NHW[:, 1:] | inside_NHW[:, :-1])
    beside_NHW = (mask_NHW[:, :, 1:] - mask_NHW[:, :, :-1]).square() * (inside_NHW[:, :, 1:] | inside_NHW[:, :, :-1])
    num_lines_N = (through_NH.sum(1) + through_NW.sum(1)).clamp(min=1)
    return (below_NHW.sum((1, 2)) + beside_NHW.sum((1, 2))) / num_lines_N


def _shares(chosen_NL: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / the number of chosen lines where chosen, 0 elsewhere: divided before the sum, no partial sum overflows."""
    return chosen_NL.to(dtype) / chosen_NL.sum(1, keepdim=True).clamp(min=1)


def _lines(mask_logits_NHW: Tensor, rows_NH: Tensor, columns_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows and columns go through the box, bool."""
    num_rows, height, width = mask_logits_NHW.shape
    if tuple(rows_NH.shape) != (num_rows, height) or tuple(columns_NW.shape) != (num_rows, width):
        raise ValueError(
            f"expected box rows {(num_rows, height)} and columns {(num_rows, width)}, "
            f"got {tuple(rows_NH.shape)} and {tuple(columns_NW.shape)}"
        )
    return rows_NH > 0, columns_NW > 0
