"""What training images ask of a network: enough queries for their objects, and an input in which these are not too small."""

from __future__ import annotations

import math
import statistics
from typing import Any

from sim_hf.data.mixture import MixedRows

SPARE_QUERIES = 1.25  # times the objects of a crowded image: queries that find nothing say so
MOST_QUERIES = 300
LARGE_ENOUGH = 28  # input pixels, seven cells of the mask grid: a mask has a shape there
_ROWS_LOOKED_AT = 2000


def crowded_image(train: Any) -> int:
    """Objects in a crowded image: no more than one image in a hundred holds more. 0 for a stream, which nobody has seen yet."""
    if not isinstance(train, MixedRows):
        return 0
    counts = sorted(train.object_counts())
    return counts[math.ceil(0.99 * len(counts)) - 1] if counts else 0


def queries_for(crowded: int, present: int) -> int:
    """Queries for images with so many objects: those that are there, or more where they do not suffice."""
    return present if crowded <= present else max(present, min(math.ceil(SPARE_QUERIES * crowded), MOST_QUERIES))


def typical_object(train: Any) -> float | None:
    """Median side of the objects, sqrt(width * height), as a share of the longest side of their image; None for a stream and
    for data without objects. Of a large data set some evenly spaced rows are looked at."""
    if not isinstance(train, MixedRows):
        return None
    rows = (train[index] for index in range(0, len(train), len(train) // _ROWS_LOOKED_AT + 1))
    sides = [
        math.sqrt(width * height) / max(row["width"], row["height"])
        for row in rows
        for _, _, width, height in row["objects"]["bbox"]
        if width > 0 and height > 0
    ]
    return statistics.median(sides) if sides else None


def fitting_input(typical: float | None, present: int) -> int:
    """Longest side of the input at which a typical object is `LARGE_ENOUGH`: the present one or more, at most twice as much, in
    steps of 32 pixels."""
    if typical is None or typical * present >= LARGE_ENOUGH:
        return present
    return min(32 * math.ceil(LARGE_ENOUGH / typical / 32), 2 * present)
