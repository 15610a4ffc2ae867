"""COCO's segmentations (polygons, compressed and uncompressed run lengths) to boolean masks, and both to run lengths.

Shape letters: H W rows and columns of the image. Run lengths are COCO's: down the columns, starting with background.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from pycocotools import mask as coco_mask

from sim_hf.data.run_lengths import crop_runs, read_runs

MIN_POLYGON_NUMBERS = 6  # three corners


def decode_segmentation(
    segmentation: str | list | dict, height: int, width: int, *, annotation_id: int | None = None
) -> np.ndarray:
    """One annotation's COCO `segmentation` (or the JSON text of it) -> (height, width) bool.

    Parts of a polygon list with fewer than three corners hold no area and are left out; an annotation without any other part
    is an error, as are run lengths of another size than the image.
    """
    name = "segmentation" if annotation_id is None else f"segmentation of annotation {annotation_id}"
    return _decode(_coco_rle(_parsed(segmentation, name), height, width, name), name)


def segmentation_rle(segmentation: str | list | dict, height: int, width: int) -> dict[str, Any]:
    """What `encode_rle(decode_segmentation(...))` gives, and its errors; without the pixels, unless runs of length 0 or
    numbers that are written too long have to go."""
    segmentation = _parsed(segmentation, "segmentation")
    run_lengths = _coco_rle(segmentation, height, width, "segmentation")
    # What is made from polygons is always as `encode_rle` would write it.
    if isinstance(segmentation, list) or read_runs([run_lengths["counts"]]).is_canonical():
        return {"size": [int(height), int(width)], "counts": run_lengths["counts"].decode("ascii")}
    return encode_rle(_decode(run_lengths, "segmentation"))


def checked_rles(rles: Sequence[Any]) -> list[dict[str, Any]]:
    """Run lengths of any origin, each as `encode_rle` writes it: `size` [height, width], `counts` str. One that is broken is
    an error that says which."""
    if _are_canonical(rles):
        return [{"size": list(rle["size"]), "counts": rle["counts"]} for rle in rles]
    checked = []
    for position, rle in enumerate(rles):
        try:
            height, width = rle["size"]
            checked.append(segmentation_rle(dict(rle), int(height), int(width)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"run lengths {position} are broken: {error}") from error
    return checked


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """A boolean mask -> `{"size": [height, width], "counts": str}`, ready for JSON."""
    if mask_HW.ndim != 2:
        raise ValueError(f"a mask must be (height, width), got {mask_HW.shape}")
    height, width = mask_HW.shape
    if mask_HW.dtype != np.bool_:
        run_lengths: Any = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
        return {"size": [int(height), int(width)], "counts": run_lengths["counts"].decode("ascii")}
    # Turning a whole mask column by column, as pycocotools' encoder needs it, costs more than the encoding; most are small.
    rows = np.flatnonzero(mask_HW.any(1))
    if not len(rows):
        return encode_crop(np.zeros((0, 0), dtype=bool), 0, 0, (height, width))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask_HW[top:bottom].any(0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    return encode_crop(mask_HW[top:bottom, left:right].T, left, top, (height, width))


def encode_crop(crop_ST: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """What `encode_rle` gives for a mask of this size (height, width) that is empty outside of a box. crop_ST: the inside of
    the box, S columns of T rows; left, top: its first column and row."""
    counts: Any = {"size": list(size), "counts": crop_runs(crop_ST, left, top, size)}
    run_lengths: Any = coco_mask.frPyObjects(counts, *size)
    return {"size": [int(side) for side in size], "counts": run_lengths["counts"].decode("ascii")}


def rle_areas(rles: list[Any]) -> np.ndarray:
    """Numbers of pixels (n,), float64. pycocotools writes their count into 8 bits: more than 255 at once are an error."""
    parts = [coco_mask.area(cast(Any, rles[start : start + 255])) for start in range(0, len(rles), 255)]
    return np.concatenate([np.zeros(0), *parts])


def rle_boxes(rles: list[Any]) -> np.ndarray:
    """The tight boxes (n, 4) xywh, float64; of an empty mask all 0."""
    return np.asarray(coco_mask.toBbox(cast(Any, rles)), dtype=np.float64).reshape(-1, 4)


def _are_canonical(rles: Sequence[Any]) -> bool:
    """Whether all are as `encode_rle` writes them. All at once: numpy's calls cost more than what they do for one."""
    for rle in rles:
        if not isinstance(rle, dict) or type(rle.get("counts")) is not str or type(rle.get("size")) is not list:
            return False
        if [type(side) for side in rle["size"]] != [int, int] or min(rle["size"]) < 0:
            return False
    try:
        runs = read_runs([rle["counts"].encode("ascii") for rle in rles])
    except ValueError:  # one of them is broken; UnicodeEncodeError is one, too
        return False
    return runs.is_canonical() and runs.num_pixels().tolist() == [math.prod(rle["size"]) for rle in rles]


def _parsed(segmentation: Any, name: str) -> Any:
    if not isinstance(segmentation, str):
        return segmentation
    try:
        return json.loads(segmentation)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from error


def _coco_rle(segmentation: Any, height: int, width: int, name: str) -> Any:
    """pycocotools' compressed run lengths, `counts` as bytes."""
    if isinstance(segmentation, list):
        return _polygons_to_rle(segmentation, height, width, name)
    if isinstance(segmentation, dict):
        return _checked_rle(segmentation, height, width, name)
    raise ValueError(f"{name}: expected polygons or run lengths, got {type(segmentation).__name__}")


def _decode(run_lengths: Any, name: str) -> np.ndarray:
    try:
        return coco_mask.decode(run_lengths).astype(bool)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: cannot be decoded ({error})") from error


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
    if not isinstance(size, list) or size != [height, width] or min(size) < 0:
        raise ValueError(f"{name}: run lengths of size {size}, the image is [{height}, {width}] (height, width)")
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"{name}: run lengths must be counts that add up to {height * width}")
        uncompressed: Any = {"size": size, "counts": counts}
        return coco_mask.frPyObjects(uncompressed, height, width)
    if isinstance(counts, (str, bytes)):
        return {"size": size, "counts": _checked_counts(counts, height * width, name)}
    raise ValueError(f"{name}: `counts` must be a list or a string, got {type(counts).__name__}")


def _checked_counts(counts: str | bytes, num_pixels: int, name: str) -> bytes:
    """pycocotools decodes too few counts without a word: the rest of the mask is then what was in memory."""
    if isinstance(counts, str) and not counts.isascii():
        raise ValueError(f"{name}: `counts` has characters that are not ASCII")
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    try:
        (total,) = read_runs([text]).num_pixels().tolist()
    except ValueError as error:
        raise ValueError(f"{name}: cannot be decoded ({error})") from error
    if total != num_pixels:
        raise ValueError(f"{name}: cannot be decoded (`counts` add up to {total}, the image has {num_pixels} pixels)")
    return text
