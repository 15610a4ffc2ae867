"""COCO's [x, y, width, height]: telling it from [x1, y1, x2, y2], and what is done with boxes that do not fit their image.

Shape letters: A annotations, 4 the numbers of a box, 2 (width, height) of the image of each annotation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BOX_FORMATS = ("xywh", "xyxy")
# Rounding and counting pixels from 1 put true boxes up to a pixel outside: they are clipped without a word.
OVERSHOOT_TOLERANCE = 1.0
MIN_CLIPPED_SIDE = 0.01
# Measured on three COCO subsets: corners read as sizes put 74-80 % of the boxes more than a pixel outside, true ones 0.00 %.
_MIN_LEAVING_SHARE = 0.05
_MAX_MISFIT_SHARE = 0.01
_MIN_LEAVING_BOXES = 3
# Careless true boxes leave by a few pixels; corners taken for sizes leave by a good part of the image.
_MIN_MEDIAN_OVERSHOOT = 0.02


@dataclass(frozen=True)
class BoxRepair:
    """What became of each box: `boxes_A4` xywh, clipped; `keep_A` whether it is usable; the other masks say why not, or that
    it was clipped by more than the tolerance."""

    boxes_A4: np.ndarray
    keep_A: np.ndarray
    not_finite_A: np.ndarray
    negative_A: np.ndarray
    empty_A: np.ndarray
    outside_A: np.ndarray
    clipped_A: np.ndarray


def check_box_format(box_format: str) -> None:
    if box_format not in BOX_FORMATS:
        raise ValueError(f"box_format must be one of {', '.join(BOX_FORMATS)}, got {box_format!r}")


def xyxy_to_xywh(boxes_A4: np.ndarray) -> np.ndarray:
    """Corners to corner and size."""
    with np.errstate(invalid="ignore"):
        return np.concatenate([boxes_A4[:, :2], boxes_A4[:, 2:] - boxes_A4[:, :2]], axis=1)


def looks_like_xyxy(boxes_A4: np.ndarray, sizes_A2: np.ndarray) -> bool:
    """Whether boxes that should be xywh are corners: more than 5 % leave their image by more than a pixel when they are read
    as xywh, and at most 1 % do not fit when they are read as xyxy."""
    finite_A = np.logical_and.reduce(np.isfinite(boxes_A4), axis=1)
    boxes_A4, sizes_A2 = boxes_A4[finite_A], sizes_A2[finite_A]
    if len(boxes_A4) == 0:
        return False
    overshoot_A2 = boxes_A4[:, :2] + boxes_A4[:, 2:] - sizes_A2
    leaves_A = np.logical_or.reduce(overshoot_A2 > OVERSHOOT_TOLERANCE, axis=1)
    if leaves_A.sum() < _MIN_LEAVING_BOXES or leaves_A.mean() <= _MIN_LEAVING_SHARE:
        return False
    if np.median((overshoot_A2 / sizes_A2).max(axis=1)[leaves_A]) < _MIN_MEDIAN_OVERSHOOT:
        return False
    misfit_A = (
        (boxes_A4[:, :2] < -OVERSHOOT_TOLERANCE)
        | (boxes_A4[:, 2:] <= boxes_A4[:, :2])
        | (boxes_A4[:, 2:] > sizes_A2 + OVERSHOOT_TOLERANCE)
    ).any(axis=1)
    return bool(misfit_A.mean() <= _MAX_MISFIT_SHARE)


def repair_boxes(boxes_A4: np.ndarray, sizes_A2: np.ndarray) -> BoxRepair:
    """Clip xywh boxes to their images and say which ones hold no part of it. The masks exclude each other."""
    finite_A = np.logical_and.reduce(np.isfinite(boxes_A4), axis=1)
    boxes_A4 = np.where(finite_A[:, None], boxes_A4, 0.0).astype(np.float64)
    sides_A2 = boxes_A4[:, 2:]
    negative_A = finite_A & np.logical_or.reduce(sides_A2 < 0, axis=1)
    empty_A = finite_A & ~negative_A & (sides_A2 == 0).any(axis=1)
    low_A2 = boxes_A4[:, :2].clip(0, sizes_A2)
    high_A2 = (boxes_A4[:, :2] + sides_A2).clip(0, sizes_A2)
    smallest_side_A2 = np.minimum(sides_A2, MIN_CLIPPED_SIDE)  # a box that thin by itself stays
    usable_A = finite_A & ~negative_A & ~empty_A
    outside_A = usable_A & (high_A2 - low_A2 < smallest_side_A2 * 0.999).any(axis=1)
    keep_A = usable_A & ~outside_A
    overshoot_A = np.maximum(-boxes_A4[:, :2], boxes_A4[:, :2] + sides_A2 - sizes_A2).max(axis=1)
    inside_A = keep_A & (overshoot_A <= 0)
    repaired_A4 = np.concatenate([low_A2, high_A2 - low_A2], axis=1)
    return BoxRepair(
        boxes_A4=np.where(inside_A[:, None], boxes_A4, repaired_A4),  # what needs no repair keeps its very numbers
        keep_A=keep_A,
        not_finite_A=~finite_A,
        negative_A=negative_A,
        empty_A=empty_A,
        outside_A=outside_A,
        clipped_A=keep_A & (overshoot_A > OVERSHOOT_TOLERANCE),
    )


def duplicate_boxes(boxes_A4: np.ndarray, groups_A2: np.ndarray) -> np.ndarray:
    """True for every box that repeats an earlier one with the same group numbers (image, label) -> (A,) bool."""
    if len(boxes_A4) == 0:
        return np.zeros(0, dtype=bool)
    columns = [boxes_A4[:, i] for i in range(4)] + [groups_A2[:, 0], groups_A2[:, 1]]
    order_A = np.lexsort(columns)
    same_A = np.ones(len(order_A) - 1, dtype=bool)
    for column in columns:
        sorted_column = column[order_A]
        same_A &= sorted_column[1:] == sorted_column[:-1]
    duplicate_A = np.zeros(len(order_A), dtype=bool)
    duplicate_A[order_A[1:][same_A]] = True  # lexsort is stable: the first of a run is the first of the file
    return duplicate_A
