"""Masks to COCO polygons that decode to the same pixels (holes excepted, which COCO polygons cannot express)."""

from __future__ import annotations

import numpy as np


def mask_polygons(mask_HW: np.ndarray) -> list[list[float]]:
    """The outlines of a boolean mask (H, W) along its pixel edges -> COCO polygons [[x1, y1, x2, y2, ...], ...].

    One polygon for each 4-connected region, the largest first (some tools read no other), corners only. Holes are filled: a
    COCO segmentation is the union of its polygons.
    """
    padded = np.pad(np.asarray(mask_HW, dtype=bool), 1)
    following = _edges(padded)
    found: list[tuple[float, list[float]]] = []
    while following:
        start = min(following)  # the topmost, then leftmost corner: never on a hole before its outline
        loop = _trace(following, start)
        area = _signed_area(loop)
        if area > 0:
            found.append((area, [float(value) for y, x in _corners(loop) for value in (x, y)]))
    return [polygon for _, polygon in sorted(found, key=lambda entry: -entry[0])]


def _edges(padded: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Directed pixel edges with the mask on their right, as corner -> next corners, in unpadded coordinates (y, x)."""
    inside = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def add(cells: np.ndarray, start: tuple[int, int], end: tuple[int, int]) -> None:
        for y, x in np.argwhere(cells).tolist():
            following.setdefault((y + start[0], x + start[1]), []).append((y + end[0], x + end[1]))

    add(inside & ~padded[:-2, 1:-1], (0, 0), (0, 1))  # top edge, to the right
    add(inside & ~padded[1:-1, 2:], (0, 1), (1, 1))  # right edge, down
    add(inside & ~padded[2:, 1:-1], (1, 1), (1, 0))  # bottom edge, to the left
    add(inside & ~padded[1:-1, :-2], (1, 0), (0, 0))  # left edge, up
    return following


def _trace(following: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]) -> list[tuple[int, int]]:
    """Walk one closed loop and take its edges away; where two regions touch at a corner, turn right, staying on one of them."""
    loop, here, direction = [start], start, (0, 1)
    while True:
        choices = following[here]
        right = (direction[1], -direction[0])
        turn = {right: 0, direction: 1}
        there = min(choices, key=lambda end: turn.get((end[0] - here[0], end[1] - here[1]), 2))
        choices.remove(there)
        if not choices:
            del following[here]
        direction, here = (there[0] - here[0], there[1] - here[1]), there
        if here == start:
            return loop
        loop.append(here)


def _corners(loop: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without the points in the middle of straight lines."""
    points = np.array(loop)
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    return [tuple(point) for point in points[(before != after).any(1)].tolist()]


def _signed_area(loop: list[tuple[int, int]]) -> float:
    """Positive for an outline (clockwise on screen), negative for a hole."""
    y, x = np.array(loop, dtype=float).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
