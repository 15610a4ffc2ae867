"""Boxes that a person draws or pastes: lines of corners, or the annotations of one image in COCO's format."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from uploads import UploadError

MAX_BOXES = 50
MAX_TEXT = 400_000  # characters
_MIN_SIDE = 1.0  # pixel
_HOW = "Write one box a line, as x1, y1, x2, y2 in pixels, or paste the COCO JSON of this image."
_SEPARATORS = re.compile(r"[\s,;()\[\]]+")


@dataclass(frozen=True)
class NamedBox:
    """Corners in pixels of the uploaded picture, and what is in it, "" if nobody said."""

    x1: float
    y1: float
    x2: float
    y2: float
    name: str = ""

    def corners(self) -> list[float]:
        return [self.x1, self.y1, self.x2, self.y2]


def parse_boxes(text: str) -> list[NamedBox]:
    """Raises `UploadError`, which says which line or annotation is wrong and how boxes are written."""
    if len(text) > MAX_TEXT:
        raise UploadError(f"This is too much text: at most {MAX_TEXT:,} characters.")
    text = text.strip()
    if not text:
        raise UploadError(f"There are no boxes yet. {_HOW}")
    return _from_coco(text) if text.startswith("{") or re.match(r"\[\s*\{", text) else _from_lines(text)


def boxes_inside(boxes: list[NamedBox], size: tuple[int, int]) -> list[NamedBox]:
    """Cut at the border of a picture of (height, width); one that lies outside or is no box is an error."""
    if not boxes:
        raise UploadError("There are no boxes yet: draw one on the picture, or paste some.")
    if len(boxes) > MAX_BOXES:
        raise UploadError(f"These are {len(boxes)} boxes; at most {MAX_BOXES} at a time, please.")
    return [_inside(number, box, size) for number, box in enumerate(boxes, 1)]


def _inside(number: int, box: NamedBox, size: tuple[int, int]) -> NamedBox:
    height, width = size
    written = ", ".join(f"{value:g}" for value in box.corners())
    if not all(math.isfinite(value) for value in box.corners()):
        raise UploadError(f"Box {number} ({written}) has a number that is not finite.")
    if box.x2 <= box.x1 or box.y2 <= box.y1:
        raise UploadError(f"Box {number} ({written}) is empty: x2 must be larger than x1, and y2 than y1.")
    x1, x2 = (min(max(value, 0.0), float(width)) for value in (box.x1, box.x2))
    y1, y2 = (min(max(value, 0.0), float(height)) for value in (box.y1, box.y2))
    if x2 - x1 < min(_MIN_SIDE, box.x2 - box.x1) or y2 - y1 < min(_MIN_SIDE, box.y2 - box.y1):
        raise UploadError(f"Box {number} ({written}) lies outside the picture, which is {width} x {height} pixels.")
    return NamedBox(x1, y1, x2, y2, box.name)


def _from_lines(text: str) -> list[NamedBox]:
    boxes = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = [field for field in _SEPARATORS.split(line) if field]
        if not fields:
            continue
        try:
            x1, y1, x2, y2 = (float(field) for field in fields)
        except ValueError:
            raise UploadError(f"Line {number} is not four numbers: {line.strip()[:60]!r}. {_HOW}") from None
        boxes.append(NamedBox(x1, y1, x2, y2))
    return boxes


def _from_coco(text: str) -> list[NamedBox]:
    """A COCO document with the boxes of one image, or only the list of its annotations."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise UploadError(f"This looks like JSON but cannot be read. {_HOW}") from None
    annotations = document.get("annotations") if isinstance(document, dict) else document
    if not isinstance(annotations, list):
        raise UploadError("This JSON has no list of annotations.")
    categories = document.get("categories") if isinstance(document, dict) else None
    names = {
        str(category.get("id")): str(category.get("name", ""))[:60]
        for category in (categories if isinstance(categories, list) else [])
        if isinstance(category, dict)
    }
    annotations = [a for a in annotations if not (isinstance(a, dict) and a.get("iscrowd"))]
    boxes = [_from_annotation(number, annotation, names) for number, annotation in enumerate(annotations, 1)]
    num_images = len({str(annotation.get("image_id")) for annotation in annotations})
    if num_images > 1:
        raise UploadError(f"This JSON has the boxes of {num_images} images; paste those of this picture only.")
    return boxes


def _from_annotation(number: int, annotation: Any, names: dict[str, str]) -> NamedBox:
    box = annotation.get("bbox") if isinstance(annotation, dict) else None
    if (
        not isinstance(box, list)
        or len(box) != 4
        or any(isinstance(value, bool) or not isinstance(value, int | float) for value in box)
    ):
        raise UploadError(f"Annotation {number} has no `bbox` of four numbers: x, y, width, height.")
    try:
        x, y, width, height = (float(value) for value in box)
    except OverflowError:  # an integer beyond the range of float
        raise UploadError(f"Annotation {number} has a number that is not finite.") from None
    return NamedBox(x, y, x + width, y + height, names.get(str(annotation.get("category_id")), ""))
