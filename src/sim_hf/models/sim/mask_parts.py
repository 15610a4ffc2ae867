"""The main part of a mask, without the bits of other objects.

A query that should be one of many alike objects often marks bits of the others, too, far from its own: the mask's box then spans
half of the picture. An object that something hides in part also has a mask of several parts, but these lie close together.

Shape letters: Q queries, h and w rows and columns of the mask grid, L either.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

Span = tuple[int, int]  # first, and the one after the last


def main_parts(
    mask_logits_Qhw: Tensor, spans: list[tuple[Span, Span] | None], cut: float, max_gap: float
) -> tuple[Tensor, list[tuple[Span, Span] | None]]:
    """Logits in which only the main part of each mask exceeds `cut`, and its box on the grid; those given stay as they are.

    spans: rows and columns of the boxes of the masks, None for an empty one. Parts are told apart by empty rows or columns of
    the mask, more of them than `max_gap` times the square root of its area. The largest part stays, and is looked at again.
    """
    masks_Qhw = (mask_logits_Qhw > cut).cpu().numpy()  # one transfer
    main_spans = [
        None if span is None else _main_part(mask_hw, *span, max_gap) for mask_hw, span in zip(masks_Qhw, spans, strict=True)
    ]
    pairs = enumerate(zip(main_spans, spans, strict=True))
    torn = {query: main for query, (main, whole) in pairs if main is not None and main != whole}
    if torn:
        mask_logits_Qhw = mask_logits_Qhw.clone()
    for query, (rows, columns) in torn.items():
        part_hw = mask_logits_Qhw[query, slice(*rows), slice(*columns)].clone()
        mask_logits_Qhw[query].clamp_(max=cut)
        mask_logits_Qhw[query, slice(*rows), slice(*columns)] = part_hw
    return mask_logits_Qhw, main_spans


def _main_part(mask_hw: np.ndarray, rows: Span, columns: Span, max_gap: float) -> tuple[Span, Span]:
    while True:
        part_hw = mask_hw[slice(*rows), slice(*columns)]
        reach = max_gap * math.sqrt(part_hw.sum())
        first, stop = _heaviest_run(part_hw.sum(1), reach)
        left, right = _heaviest_run(part_hw[first:stop].sum(0), reach)
        if (stop - first, right - left) == part_hw.shape:
            return rows, columns
        rows, columns = (rows[0] + first, rows[0] + stop), (columns[0] + left, columns[0] + right)


def _heaviest_run(cells_L: np.ndarray, reach: float) -> Span:
    """Of the runs between which more than `reach` places are empty, the one with most cells (the first of equals)."""
    places_N = np.flatnonzero(cells_L)
    breaks = np.flatnonzero(np.diff(places_N) - 1 > reach)
    firsts, lasts = places_N[np.r_[0, breaks + 1]], places_N[np.r_[breaks, -1]]
    best = int(np.add.reduceat(cells_L, firsts).argmax())
    return int(firsts[best]), int(lasts[best]) + 1
