"""Detection data sets of the Hub (or saved in a folder) in the columns that `load_coco` gives.

The convention is `image` and `objects` {bbox, category}; what else a data set lacks is filled in: image ids by position, sizes
from the image header, areas from the boxes. Only these small columns are written anew, the images stay where they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value

from sim_hf.data.box_format import check_box_format, looks_like_xyxy, repair_boxes, xyxy_to_xywh
from sim_hf.data.category_ids import category_description, category_ids, has_category_ids
from sim_hf.data.coco import coco_features
from sim_hf.data.images import read_image_size

_BOX_NAMES = ("bbox", "bboxes", "boxes")
_CATEGORY_NAMES = ("category", "category_id", "categories", "label", "labels")
_NUM_SAMPLED_ROWS = 64  # enough boxes to tell their format, few enough to stream
_MAX_OBJECTS = 100_000  # per image, when annotation ids have to be made up


@dataclass(frozen=True)
class DetectionColumns:
    """How a data set spells the convention. label_of: category as it is written -> label, None when it is the label."""

    bbox: str
    category: str
    names: list[str]
    label_of: dict[Any, int] | None = None
    category_ids: list[int] | None = None
    with_masks: bool = False


def load_detection_dataset(
    name_or_path: str | os.PathLike[str],
    split: str = "train",
    streaming: bool = False,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    class_names: Sequence[str] | None = None,
    box_format: str = "xywh",
) -> Dataset | IterableDataset:
    """A detection data set from the Hub, a folder (of `save_to_disk` or parquet) or a parquet file, in `load_coco`'s columns.

    Categories may be ClassLabels, integers or strings. Integers without `class_names` are numbered in order and keep their value
    as name and category id; that needs to see all of them, so it is an error when streaming. Boxes are clipped, and those
    without area dropped, as `load_coco` does.
    """
    check_box_format(box_format)
    dataset = _open(name_or_path, split, streaming, config_name, revision, token)
    columns = _detection_columns(dataset, str(name_or_path), class_names)
    target = coco_features(columns.names, with_masks=columns.with_masks)
    if dataset.features == target and box_format == "xywh" and has_category_ids(dataset):
        return dataset  # made by `load_coco`: checked already
    given = list(dataset.features or ())
    small = [name for name in ("image_id", "width", "height", "objects") if name in given]
    needs_size = "width" not in given or "height" not in given
    undecoded = dataset.select_columns(["image", *small]).cast_column("image", Image(decode=False))
    _check_sample(undecoded, columns, box_format, str(name_or_path))
    convert = partial(_standard_row, columns=columns, box_format=box_format)
    if isinstance(undecoded, IterableDataset):
        # Given to `map`, the features would count as applied already and the images stay undecoded.
        result = undecoded.map(convert, with_indices=True).cast(target)
    else:
        result = _with_new_columns(undecoded, convert, target, needs_size)
    if columns.category_ids is not None:
        result.info.description = category_description(columns.category_ids)
    return result


def _open(
    name_or_path: str | os.PathLike[str],
    split: str,
    streaming: bool,
    config_name: str | None,
    revision: str | None,
    token: str | bool | None,
) -> Dataset | IterableDataset:
    name, path = str(name_or_path), Path(name_or_path)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not path.exists():
        raise ValueError(f"{name}: no such file or folder")
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{name}: expected a folder or a .parquet file")
        files = {split: str(path)}
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming)
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if not saved:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming, revision=revision, token=token)
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{name}: no split {split!r}, it has {', '.join(map(repr, loaded))}")
        loaded = loaded[split]
    if not streaming:
        return loaded
    stream = loaded.to_iterable_dataset()
    stream.info.description = loaded.info.description  # the category ids: streaming does not carry them along by itself
    return stream


def _detection_columns(dataset: Dataset | IterableDataset, name: str, class_names: Sequence[str] | None) -> DetectionColumns:
    """How the data set spells the convention; ValueError saying what it has instead."""
    features = dataset.features
    if features is None:
        raise ValueError(f"{name}: its columns are not declared; store it as parquet, or load it without streaming")
    expected = "expected `image` (Image) and `objects` with `bbox` and `category`"
    if not isinstance(features.get("image"), Image) or "objects" not in features:
        raise ValueError(f"{name}: {expected}, it has {_spelled(features)}")
    objects: Any = features["objects"]
    # `List({...})` is read as a list of records, `{...: List()}` as a record of lists: both are in use.
    fields = objects.feature if isinstance(objects, List) else objects
    if not isinstance(fields, Mapping):
        raise ValueError(f"{name}: {expected}, `objects` is {objects}")
    bbox = next((key for key in _BOX_NAMES if key in fields), None)
    category = next((key for key in _CATEGORY_NAMES if key in fields), None)
    if bbox is None or category is None:
        raise ValueError(f"{name}: {expected}, `objects` has {', '.join(fields)}")
    masks = fields.get("segmentation")
    with_masks = (masks.feature if isinstance(masks, List) else masks) == Value("string")
    label = fields[category].feature if isinstance(fields[category], List) else fields[category]
    if isinstance(label, ClassLabel):
        ids = category_ids(dataset) if has_category_ids(dataset) else None
        return DetectionColumns(bbox, category, list(label.names), category_ids=ids, with_masks=with_masks)
    if class_names is not None:
        names = list(class_names)
        label_of = {value: i for i, value in enumerate(names)} if label == Value("string") else None
        return DetectionColumns(bbox, category, names, label_of, with_masks=with_masks)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name}: `objects.{category}` holds {label}, not ClassLabels; to stream it, give class_names")
    values = _category_values(dataset, category)
    if not values:
        raise ValueError(f"{name}: no object has a category; give class_names")
    ids = values if all(isinstance(value, int) for value in values) else None
    label_of = {value: i for i, value in enumerate(values)}
    return DetectionColumns(bbox, category, [str(value) for value in values], label_of, ids, with_masks)


def _spelled(features: Features) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def _category_values(dataset: Dataset, category: str) -> list[Any]:
    values: set[Any] = set()
    row: Any
    for row in dataset.select_columns(["objects"]):
        values.update(_lists(row["objects"]).get(category, []))
    if None in values:
        raise ValueError(f"some objects have no {category}")
    return sorted(values)


def _lists(objects: Any) -> dict[str, list[Any]]:
    """A record of lists, whichever way round the data set has it."""
    if isinstance(objects, Mapping):
        return {key: list(value) if value is not None else [] for key, value in objects.items()}
    if not objects:
        return {}
    return {key: [record[key] for record in objects] for key in objects[0]}


def _standard_row(row: Mapping[str, Any], index: int, *, columns: DetectionColumns, box_format: str) -> dict[str, Any]:
    """One row in the columns of `load_coco`, without touching the image's pixels."""
    width, height = _size(row)
    image_id = row.get("image_id")  # names such as "000012.jpg" cannot be COCO image ids: the position is
    lists = _lists(row["objects"])
    boxes = _boxes(lists, columns, f"row {index}")
    repair = repair_boxes(xyxy_to_xywh(boxes) if box_format == "xyxy" else boxes, np.array([[width, height]], dtype=np.float64))
    kept = np.flatnonzero(repair.keep_A)
    categories = lists.get(columns.category, [])
    if len(categories) != len(boxes):
        raise ValueError(f"row {index}: {len(boxes)} boxes but {len(categories)} categories")
    labels = [_label(categories[i], columns, index) for i in kept]
    ids = lists.get("id") or [index * _MAX_OBJECTS + i + 1 for i in range(len(boxes))]
    areas = lists.get("area") or [0.0] * len(boxes)
    crowd = lists.get("iscrowd") or [False] * len(boxes)
    box_areas = repair.boxes_A4[:, 2] * repair.boxes_A4[:, 3]
    objects = {
        "id": [int(ids[i]) for i in kept],
        "bbox": [[float(number) for number in repair.boxes_A4[i]] for i in kept],
        "category": labels,
        "area": [float(areas[i] or box_areas[i]) for i in kept],
        "iscrowd": [bool(crowd[i]) for i in kept],
    }
    if columns.with_masks:
        objects["segmentation"] = [lists["segmentation"][i] or "" for i in kept]
    standard = {"image_id": image_id if isinstance(image_id, int) else index, "width": width, "height": height}
    return {**standard, "image": row["image"], "objects": objects} if "image" in row else {**standard, "objects": objects}


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    if row.get("width") and row.get("height"):
        return int(row["width"]), int(row["height"])
    height, width = read_image_size(row["image"])
    return width, height


def _boxes(lists: Mapping[str, list[Any]], columns: DetectionColumns, place: str) -> np.ndarray:
    boxes = lists.get(columns.bbox, [])
    if any(box is None or len(box) != 4 for box in boxes):
        raise ValueError(f"{place}: {columns.bbox} must hold lists of four numbers, got {boxes!r:.80}")
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _label(value: Any, columns: DetectionColumns, index: int) -> int:
    label = value if columns.label_of is None else columns.label_of.get(value)
    if not isinstance(label, int) or not 0 <= label < len(columns.names):
        raise ValueError(f"row {index}: category {value!r} is not among the {len(columns.names)} classes {columns.names!r:.80}")
    return label


def _with_new_columns(undecoded: Dataset, convert: partial, target: Features, needs_size: bool) -> Dataset:
    """Write the small columns anew and put them beside the images, which are not copied."""
    source = undecoded if needs_size else undecoded.remove_columns("image")
    small = Features({name: feature for name, feature in target.items() if name != "image"})
    rows = source.map(
        partial(_without_image, convert=convert), with_indices=True, features=small, remove_columns=source.column_names
    )
    images = undecoded.select_columns(["image"]).cast_column("image", Image())
    joined = datasets.concatenate_datasets([images, rows], axis=1)
    return joined.select_columns(list(target))


def _without_image(row: Mapping[str, Any], index: int, *, convert: partial) -> dict[str, Any]:
    return {name: value for name, value in convert(row, index).items() if name != "image"}


def _check_sample(undecoded: Iterable[Any], columns: DetectionColumns, box_format: str, name: str) -> None:
    """Refuse boxes that are relative to the image, or corners that are taken for sizes, on the first rows."""
    boxes, sizes = [], []
    for index, row in enumerate(islice(undecoded, _NUM_SAMPLED_ROWS)):
        some = _boxes(_lists(row["objects"]), columns, f"{name}, row {index}")
        boxes.append(some)
        sizes.append(np.tile(np.array(_size(row), dtype=np.float64), (len(some), 1)))
    if not boxes or not sum(map(len, boxes)):
        return
    boxes_A4, sizes_A2 = np.concatenate(boxes), np.concatenate(sizes)
    if np.nanmax(boxes_A4) <= 1 and sizes_A2.min() > 2:
        raise ValueError(f"{name}: boxes lie within 0..1, expected pixels")
    if box_format == "xywh" and looks_like_xyxy(boxes_A4, sizes_A2):
        raise ValueError(f"{name}: boxes look like [x1, y1, x2, y2], expected [x, y, width, height]; give box_format='xyxy'")
