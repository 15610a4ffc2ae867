"""COCO's segmentations (polygons, compressed and uncompressed run lengths) to boolean masks, and masks to run lengths.

Shape letters: H W rows and columns of the image. Run lengths are COCO's: down the columns, starting with background.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

MIN_POLYGON_NUMBERS = 6  # three corners


def decode_segmentation(
    segmentation: str | list | dict, height: int, width: int, *, annotation_id: int | None = None
) -> np.ndarray:
    """One annotation's COCO `segmentation` (or the JSON text of it) -> (height, width) bool.

    Parts of a polygon list with fewer than three corners hold no area and are left out; an annotation without any other part
    is an error, as are run lengths of another size than the image.
    """
    name = "segmentation" if annotation_id is None else f"segmentation of annotation {annotation_id}"
    if isinstance(segmentation, str):
        try:
            segmentation = json.loads(segmentation)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON ({error})") from error
    run_lengths: Any
    if isinstance(segmentation, list):
        run_lengths = _polygons_to_rle(segmentation, height, width, name)
    elif isinstance(segmentation, dict):
        run_lengths = _checked_rle(segmentation, height, width, name)
    else:
        raise ValueError(f"{name}: expected polygons or run lengths, got {type(segmentation).__name__}")
    try:
        return coco_mask.decode(run_lengths).astype(bool)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: cannot be decoded ({error})") from error


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """A boolean mask -> `{"size": [height, width], "counts": str}`, ready for JSON."""
    if mask_HW.ndim != 2:
        raise ValueError(f"a mask must be (height, width), got {mask_HW.shape}")
    run_lengths = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(mask_HW.shape[0]), int(mask_HW.shape[1])], "counts": run_lengths["counts"].decode("ascii")}


def _polygons_to_rle(polygons: list, height: int, width: int, name: str) -> Any:
    usable = []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 != 0:
            raise ValueError(f"{name}: a polygon must be a list x1, y1, x2, y2, ..., got {str(polygon)[:80]}")
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in polygon):
            raise ValueError(f"{name}: a polygon has coordinates that are not finite numbers")
        if len(polygon) >= MIN_POLYGON_NUMBERS:
            usable.append([float(number) for number in polygon])
    if not usable:
        raise ValueError(f"{name}: no polygon with at least three corners")
    return coco_mask.merge(coco_mask.frPyObjects(usable, height, width))


def _checked_rle(segmentation: dict, height: int, width: int, name: str) -> Any:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(f"{name}: run lengths of size {size}, the image is [{height}, {width}] (height, width)")
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"{name}: run lengths must be counts that add up to {height * width}")
        uncompressed: Any = {"size": size, "counts": counts}
        return coco_mask.frPyObjects(uncompressed, height, width)
    if isinstance(counts, (str, bytes)):
        return {"size": size, "counts": counts.encode("ascii", "replace") if isinstance(counts, str) else counts}
    raise ValueError(f"{name}: `counts` must be a list or a string, got {type(counts).__name__}")
