"""The segmentations of a COCO file as JSON text per annotation, checked; used only when masks are asked for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import orjson

from sim_hf.data.segmentation_text import SegmentationText

_MIN_POLYGON_NUMBERS = 6  # three corners
NO_SEGMENTATION = ""


@dataclass(frozen=True)
class SegmentationVerdict:
    """`text`: canonical JSON, "" when there is no mask. `fault`: why the value is no segmentation. `num_short`: polygons
    without area that were left out."""

    text: str = NO_SEGMENTATION
    fault: str | None = None
    num_short: int = 0


def check_segmentation(value: Any, pieces: SegmentationText, height: int, width: int) -> SegmentationVerdict:
    """One annotation's segmentation. `value` is what the document holds: normally the number of a piece of `pieces`."""
    if type(value) is int:
        if not 0 <= value < len(pieces):
            return SegmentationVerdict(fault=f"is the number {value}")
        try:
            value = _parse(pieces[value])
        except (ValueError, RecursionError) as error:
            return SegmentationVerdict(fault=f"is not JSON ({error!s:.80})")
    if value is None or value == [] or value == {}:
        return SegmentationVerdict()
    if isinstance(value, list):
        return _check_polygons(value)
    if isinstance(value, dict):
        fault = _run_length_fault(value, height, width)
        if fault is not None:
            return SegmentationVerdict(fault=fault)
        return SegmentationVerdict(orjson.dumps({"size": value["size"], "counts": value["counts"]}).decode())
    return SegmentationVerdict(fault=f"is a {type(value).__name__}")


def _parse(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)  # NaN and 1e999 get through here and are refused by name below


def _check_polygons(polygons: list[Any]) -> SegmentationVerdict:
    for polygon in polygons:
        if not isinstance(polygon, list):
            return SegmentationVerdict(fault="is a flat list, expected a list of polygons")
        if not set(map(type, polygon)) <= {int, float}:
            return SegmentationVerdict(fault="has coordinates that are not numbers")
        if len(polygon) % 2:
            return SegmentationVerdict(fault=f"has a polygon of {len(polygon)} numbers, expected x, y pairs")
        if not _all_finite(polygon):
            return SegmentationVerdict(fault="has coordinates that are not finite")
    usable = [polygon for polygon in polygons if len(polygon) >= _MIN_POLYGON_NUMBERS]
    text = orjson.dumps([[float(number) for number in polygon] for polygon in usable]).decode() if usable else ""
    return SegmentationVerdict(text, num_short=len(polygons) - len(usable))


def _all_finite(numbers: list[float]) -> bool:
    try:
        return math.isfinite(sum(numbers))  # NaN and infinities survive a sum: several times faster than asking each number
    except OverflowError:  # an integer of hundreds of digits
        return False


def _run_length_fault(value: dict[str, Any], height: int, width: int) -> str | None:
    size, counts = value.get("size"), value.get("counts")
    if size != [height, width]:
        return f"has size {size!r:.40}, expected [{height}, {width}] (height, width)"
    if isinstance(counts, str):
        return None if counts.isascii() and counts else "has counts that are no run lengths"
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        return "has counts that are no run lengths"
    total = math.fsum(counts)
    return None if total == height * width else f"has counts that add up to {total:.0f}, expected {height * width}"
