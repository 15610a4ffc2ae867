"""Ground truth for COCO evaluation: a clean copy of what the user has, so that pycocotools cannot go wrong on it.

pycocotools takes annotation id 0 for "unmatched", counts duplicate ids once, needs `area` and `iscrowd`, and reads a polygon
of four numbers as a box, all without a word. The copy has ids from 1, every field, and masks as run lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pycocotools import mask as coco_mask

from sim_hf.data.category_ids import category_feature
from sim_hf.data.category_ids import category_ids as known_category_ids
from sim_hf.data.masks import encode_rle, segmentation_rle

MAX_PROBLEMS_LISTED = 5


def coco_ground_truth(
    source: str | Path | Mapping[str, Any] | Dataset, *, category_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """A normalised copy of an annotation file (path or its content) or of a `datasets.Dataset` in the detection convention.

    `category_ids` (only for a Dataset): label -> original category id; left out: those the data set keeps.
    The result is COCO's format plus: `has_masks` (every annotation that is no crowd has a usable mask), `num_without_mask`
    (how many have none) and `mask_problems` (the first of them, by name). `source` is not changed.
    """
    if isinstance(source, Dataset):
        source = _from_dataset(source, category_ids)
    elif not isinstance(source, Mapping):
        source = _read_json(Path(source))
    for key in ("images", "annotations", "categories"):
        if not isinstance(source.get(key), list):
            raise ValueError(f"ground truth: {key!r} must be a list, got {type(source.get(key)).__name__}")
    images = _unique_by_id([_clean_image(image) for image in source["images"]], "image")
    categories = _unique_by_id(
        [{**category, "id": as_id(category.get("id"), "category id")} for category in source["categories"]], "category"
    )
    annotations, problems = [], []
    for number, annotation in enumerate(source["annotations"], start=1):
        clean, problem = _clean_annotation(annotation, number, images, categories)
        annotations.append(clean)
        if problem is not None and not clean["iscrowd"]:
            problems.append(problem)
    return {
        "info": {},
        "images": list(images.values()),
        "categories": list(categories.values()),
        "annotations": annotations,
        "has_masks": bool(annotations) and not problems,
        "num_without_mask": len(problems),
        "mask_problems": problems[:MAX_PROBLEMS_LISTED],
    }


def as_id(value: Any, what: str) -> int:
    """An id as an int: integers of any kind and strings of digits; everything else is an error."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{what} must be an integer, got {value!r}")
    return int(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected a COCO annotation file (an object), got a {type(content).__name__}")
    return content


def _from_dataset(dataset: Dataset, category_ids: Sequence[int] | None) -> dict[str, Any]:
    """A Dataset's rows as COCO's lists. No image is decoded."""
    names = _category_names(dataset)
    category_ids = known_category_ids(dataset) if category_ids is None else category_ids
    ids = [as_id(category_id, "category id") for category_id in category_ids]
    if len(ids) != len(names):
        raise ValueError(f"category_ids: {len(ids)} ids for the {len(names)} categories of the data set")
    images, annotations = [], []
    rows: Any = dataset.select_columns(["image_id", "width", "height", "objects"])
    for row in rows:
        images.append({"id": row["image_id"], "width": row["width"], "height": row["height"]})
        for instance in _rows(row["objects"]):
            label = instance.pop("category")
            annotations.append({**instance, "image_id": row["image_id"], "category_id": ids[label]})
    categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _category_names(dataset: Dataset) -> list[str]:
    missing = [name for name in ("image_id", "width", "height", "objects") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"the data set lacks the columns {missing}, it has {dataset.column_names}")
    return list(category_feature(dataset).names)


def _rows(objects: Mapping[str, list] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The instances of an image; `datasets` has them as a dict of lists or as a list of dicts."""
    if isinstance(objects, list):
        return [dict(instance) for instance in objects]
    return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]


def _unique_by_id(records: list[dict[str, Any]], what: str) -> dict[int, dict[str, Any]]:
    by_id: dict[int, dict[str, Any]] = {}
    for record in records:
        if record["id"] in by_id:
            raise ValueError(f"ground truth: {what} id {record['id']} is there twice")
        by_id[record["id"]] = record
    return by_id


def _clean_image(image: Mapping[str, Any]) -> dict[str, Any]:
    image_id = as_id(image.get("id"), "image id")
    sides = {}
    for side in ("width", "height"):
        value = image.get(side)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"ground truth: image {image_id} needs a positive integer {side}, got {value!r}")
        sides[side] = int(value)
    return {**image, "id": image_id, **sides}


def _clean_annotation(
    annotation: Mapping[str, Any], number: int, images: Mapping[int, dict], categories: Mapping[int, dict]
) -> tuple[dict[str, Any], str | None]:
    """One annotation with id `number` and all fields -> it, and why it has no usable mask (None: it has one)."""
    name = f"annotation {annotation.get('id', f'number {number}')}"
    image_id = as_id(annotation.get("image_id"), f"image_id of {name}")
    category_id = as_id(annotation.get("category_id"), f"category_id of {name}")
    if image_id not in images:
        raise ValueError(f"ground truth: {name} belongs to image {image_id}, which is not among the images")
    if category_id not in categories:
        raise ValueError(f"ground truth: {name} has category {category_id}, which is not among the categories")
    iscrowd = int(bool(annotation.get("iscrowd") or 0))
    run_lengths, problem = _run_lengths(annotation, name, images[image_id])
    box = annotation.get("bbox")
    if box is None and run_lengths is not None:
        box = coco_mask.toBbox(run_lengths).tolist()
    box = _clean_box(box, name)
    area = annotation.get("area")
    if area is None:
        area = box[2] * box[3] if run_lengths is None else float(coco_mask.area(run_lengths))
    if isinstance(area, bool) or not isinstance(area, (int, float)) or not math.isfinite(area):
        raise ValueError(f"ground truth: area of {name} must be a finite number, got {area!r}")
    if run_lengths is None and iscrowd:
        run_lengths = _filled_box(box, images[image_id])  # a crowd only takes predictions out of the count
    clean = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": area}
    clean["iscrowd"] = iscrowd
    if run_lengths is not None:
        clean["segmentation"] = run_lengths
    return clean, problem


def _clean_box(box: Any, name: str) -> list[float]:
    is_box = isinstance(box, Sequence) and len(box) == 4
    if not is_box or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box) or min(box[2:]) < 0:
        raise ValueError(f"ground truth: bbox of {name} must be 4 finite numbers x, y, width, height, got {box!r}")
    return [float(value) for value in box]


def _run_lengths(annotation: Mapping[str, Any], name: str, image: Mapping[str, Any]) -> tuple[Any, str | None]:
    segmentation = annotation.get("segmentation")
    if segmentation is None or segmentation in ("", [], {}):
        return None, f"{name} has no segmentation"
    if isinstance(segmentation, tuple):
        segmentation = list(segmentation)
    try:
        return segmentation_rle(segmentation, image["height"], image["width"]), None
    except ValueError as error:
        return None, f"{name}: {error}"


def _filled_box(box: Sequence[float], image: Mapping[str, Any]) -> dict[str, Any]:
    x, y, width, height = box
    mask_HW = np.zeros((image["height"], image["width"]), dtype=bool)
    mask_HW[max(round(y), 0) : max(round(y + height), 0), max(round(x), 0) : max(round(x + width), 0)] = True
    return encode_rle(mask_HW)
