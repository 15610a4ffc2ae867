"""Where labelling looks: the whole picture, and enlarged windows around its small boxes.

A window is as large as one box asks for (its longer side and a margin on each side of it), and shared by the neighbours of a
similar size that fit into it: in a crowded picture a few windows show hundreds of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

Region = tuple[int, int, int, int]  # left, top, right, bottom in whole pixels
_SMALLEST = 1 / 3  # of the largest box of a window: smaller ones get windows of their own
_LEAST_MARGIN = 0.2  # what a window shows around each of its boxes at least, as a share of the box's longer side


@dataclass(frozen=True)
class View:
    """A part of the picture (left, top, right, bottom), the boxes that it is for, and whether it is looked at mirrored."""

    region: Region
    owners: tuple[int, ...]
    mirrored: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the picture."""
        left, top, right, bottom = self.region
        return right - left, bottom - top

    def pixels(self, picture: Image.Image) -> Image.Image:
        """Cut out of the picture. Made when it is looked at: all views of a large picture together would fill the memory."""
        part = picture.crop(self.region)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else part

    def boxes(self, boxes_n4: Tensor) -> Tensor:
        """The boxes of its owners in its own pixels -> (owners, 4)."""
        x1, y1, x2, y2 = (boxes_n4[list(self.owners)] - torch.tensor([*self.region[:2]] * 2)).unbind(-1)
        if self.mirrored:
            x1, x2 = self.size[0] - x2, self.size[0] - x1
        return torch.stack([x1, y1, x2, y2], dim=-1)


def views_of(
    picture_size: tuple[int, int], boxes_n4: Tensor, *, small: float, margins: Sequence[float], mirrored: bool
) -> list[View]:
    """The whole picture for all boxes, and for each margin windows that show every small box once.

    picture_size: (width, height); boxes_n4: xyxy. small: a box is small if its longer side is below this share of the
    picture's. margins: what a window adds on each side of its largest box, as a share of that box's longer side.
    mirrored: every view once more, mirrored.
    """
    if len(boxes_n4) == 0:
        return []
    whole = View((0, 0, *picture_size), tuple(range(len(boxes_n4))))
    side_n = (boxes_n4[:, 2:] - boxes_n4[:, :2]).amax(-1)
    small_boxes = (side_n < small * max(picture_size)).nonzero()[:, 0].tolist()
    views = [whole]
    for margin in margins:
        views += [view for view in _windows(picture_size, boxes_n4, small_boxes, margin) if view.region != whole.region]
    views = list(dict.fromkeys(views))
    return views + [replace(view, mirrored=True) for view in views] if mirrored else views


def pixel_region(box_4: Tensor, height: int, width: int) -> Region:
    """The whole pixels that a box touches, at least one, inside the picture -> (left, top, right, bottom)."""
    x1, y1, x2, y2 = box_4.tolist()
    left, top = min(max(int(x1), 0), width - 1), min(max(int(y1), 0), height - 1)
    right, bottom = min(width, math.ceil(x2)), min(height, math.ceil(y2))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _windows(picture_size: tuple[int, int], boxes_n4: Tensor, members: list[int], margin: float) -> list[View]:
    """Square windows that show each of the boxes `members` in one of them: the largest box that none shows yet decides the
    size, and its neighbours, the nearest first, come in as long as all of them fit."""
    side_n = (boxes_n4[:, 2:] - boxes_n4[:, :2]).amax(-1).tolist()
    center_n2 = (boxes_n4[:, :2] + boxes_n4[:, 2:]) / 2
    surroundings = [_surroundings(box_4, picture_size) for box_4 in boxes_n4]
    waiting = sorted(members, key=side_n.__getitem__, reverse=True)
    found = []
    while waiting:
        largest = waiting[0]
        hull, owners = surroundings[largest], [largest]
        side = max(int(side_n[largest] * (1 + 2 * margin)) + 1, _longer_side(hull))
        distance_n = (center_n2 - center_n2[largest]).abs().amax(-1).tolist()
        similar = [i for i in waiting[1:] if side_n[i] >= _SMALLEST * side_n[largest] and distance_n[i] < side]
        for i in sorted(similar, key=distance_n.__getitem__):
            joint = _hull(hull, surroundings[i])
            if _longer_side(joint) <= side:
                hull = joint
                owners.append(i)
        shown = set(owners)
        waiting = [i for i in waiting if i not in shown]
        found.append(View(_square_around(hull, side, picture_size), tuple(owners)))
    return found


def _surroundings(box_4: Tensor, picture_size: tuple[int, int]) -> Region:
    """The pixels of a box and of the least margin around it that lie in the picture."""
    margin = _LEAST_MARGIN * (box_4[2:] - box_4[:2]).max()
    return pixel_region(box_4 + margin * torch.tensor([-1, -1, 1, 1]), *picture_size[::-1])


def _square_around(hull: Region, side: int, picture_size: tuple[int, int]) -> Region:
    """A square with `hull` in the middle, moved into the picture; where the picture is smaller, all of it."""
    spans = []
    for low, high, length in zip(hull[:2], hull[2:], picture_size, strict=True):
        start = min(max((low + high - side) // 2, 0), max(length - side, 0))
        spans.append((start, min(start + side, length)))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _hull(a: Region, b: Region) -> Region:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _longer_side(region: Region) -> int:
    return max(region[2] - region[0], region[3] - region[1])
