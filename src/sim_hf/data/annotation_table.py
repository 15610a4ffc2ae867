"""The records of a COCO document as columns, with every record that is not what COCO says counted and named.

Columns, not records, because a file may hold a million of them: the usual case (every value of one type) is one numpy call,
and only a column that holds something else is looked at value by value.

Shape letters: I images, A annotations, 4 x, y, width, height in pixels. Records keep the order of the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from sim_hf.data.validation_report import ValidationReport

_INT64 = np.iinfo(np.int64)
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class CategoryTable:
    """Sorted by id: label `i` is the category with `ids[i]` in the file."""

    ids: list[int]
    names: list[str]


@dataclass(frozen=True)
class ImageTable:
    """`usable_I` is False where the record itself is at fault."""

    ids_I: np.ndarray
    widths_I: np.ndarray
    heights_I: np.ndarray
    file_names: list[str]
    usable_I: np.ndarray

    def place(self, row: int) -> str:
        return f"image {self.ids_I[row]} ({self.file_names[row]})" if self.usable_I[row] else f"images[{row}]"


@dataclass
class AnnotationTable:
    """`image_rows_A` is -1 and `labels_A` is -1 where there is no such image or category. Boxes are as in the file;
    `malformed_A` marks what is no box at all. `areas_A` is NaN where the area of the box has to stand in."""

    ids_A: np.ndarray
    image_rows_A: np.ndarray
    labels_A: np.ndarray
    boxes_A4: np.ndarray
    malformed_A: np.ndarray
    areas_A: np.ndarray
    is_crowd_A: np.ndarray
    segmentations: list[Any] = field(default_factory=list)


def read_categories(raw: list[Any], report: ValidationReport) -> CategoryTable:
    """The categories sorted by id, names made unique."""
    records = _objects(raw, "categories", report)
    if not records:
        report.add("no-categories", [], 1)
        return CategoryTable([], [])
    ids, valid = _integers(records, "id", "category-id", "categories", report)
    _report_repeated(ids, valid, "category-id-duplicate", "category id", report)
    _report_rows(valid & (ids < 0), "category-id-negative", lambda row: f"category {ids[row]}", report)
    names = [record.get("name") for record in records]
    bad_name = np.array([not isinstance(name, str) or not name.strip() for name in names], dtype=bool)
    _report_rows(bad_name, "category-name", lambda row: f"categories[{row}]: name {names[row]!r:.60}", report)
    known = {int(ids[row]): str(names[row]) for row in np.flatnonzero(valid)}
    repeated = {name for name, number in Counter(known.values()).items() if number > 1}
    report.add("category-name-duplicate", (repr(name) for name in sorted(repeated)), len(repeated))
    ordered = sorted(known)
    return CategoryTable(ordered, [f"{known[i]} ({i})" if known[i] in repeated else known[i] for i in ordered])


def read_images(raw: list[Any], report: ValidationReport) -> ImageTable:
    """The image records; their file names are only checked for being text here."""
    records = _objects(raw, "images", report)
    ids, valid_id = _integers(records, "id", "image-id", "images", report)
    _report_repeated(ids, valid_id, "image-id-duplicate", "image id", report)
    _report_rows(valid_id & (ids < 0), "image-id-negative", lambda row: f"images[{row}]: id {ids[row]}", report)
    names = [record.get("file_name") for record in records]
    is_text = np.array([isinstance(name, str) for name in names], dtype=bool)
    _report_rows(~is_text, "image-path", lambda row: f"images[{row}]: file_name {names[row]!r:.60}", report)
    sides = []
    for key in ("width", "height"):
        values, valid, _ = integer_column(records, key)
        sides.append((values, valid & (values > 0) & (values < 2**31)))
    (widths, width_ok), (heights, height_ok) = sides
    _report_rows(
        ~(width_ok & height_ok),
        "image-size",
        lambda row: f"images[{row}]: width {records[row].get('width')!r:.40}, height {records[row].get('height')!r:.40}",
        report,
    )
    texts = [name if isinstance(name, str) else "" for name in names]
    repeated = [name for name, number in Counter(texts).items() if number > 1 and name]
    report.add("image-file-duplicate", (repr(name) for name in repeated), len(repeated))
    return ImageTable(ids, widths, heights, texts, valid_id & is_text & width_ok & height_ok)


def read_annotations(raw: list[Any], images: ImageTable, categories: CategoryTable, report: ValidationReport) -> AnnotationTable:
    """The annotations with their image rows and labels; boxes are read but not judged."""
    records = _objects(raw, "annotations", report)
    ids_A = _annotation_ids(records, report)
    image_ids_A, image_ok_A = _integers(records, "image_id", "annotation-image-id", "annotations", report)
    category_ids_A, category_ok_A = _integers(records, "category_id", "annotation-category-id", "annotations", report)
    image_rows_A = np.where(image_ok_A, _rows_of(image_ids_A, images.ids_I), -1)
    labels_A = np.where(category_ok_A, _rows_of(category_ids_A, np.array(categories.ids, dtype=np.int64)), -1)
    _report_rows(
        image_ok_A & (image_rows_A < 0),
        "unknown-image",
        lambda row: f"{_place(records, row)}: image_id {image_ids_A[row]}",
        report,
    )
    _report_rows(
        category_ok_A & (labels_A < 0),
        "unknown-category",
        lambda row: f"{_place(records, row)}: category_id {category_ids_A[row]}",
        report,
    )
    boxes_A4, malformed_A = _boxes(records, report)
    return AnnotationTable(
        ids_A=ids_A,
        image_rows_A=image_rows_A,
        labels_A=labels_A,
        boxes_A4=boxes_A4,
        malformed_A=malformed_A,
        areas_A=_areas(records, report),
        is_crowd_A=_crowd_flags(records, report),
        segmentations=[record.get("segmentation") for record in records],
    )


def integer_column(records: Records, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integers under `key` -> (values int64, whether there is one, whether it was written as a float or as text)."""
    raw = [record.get(key) for record in records]
    valid, converted = np.ones(len(raw), dtype=bool), np.zeros(len(raw), dtype=bool)
    if set(map(type, raw)) <= {int}:
        try:
            return np.array(raw, dtype=np.int64), valid, converted
        except OverflowError:
            pass  # some are beyond 64 bits: find out which
    values = np.zeros(len(raw), dtype=np.int64)
    for row, value in enumerate(raw):
        number = _as_integer(value)
        valid[row] = number is not None
        values[row] = 0 if number is None else number
        converted[row] = valid[row] and type(value) is not int
    return values, valid, converted


def _as_integer(value: Any) -> int | None:
    is_whole = type(value) is float and value.is_integer()
    if is_whole or (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20):
        value = int(value)
    if type(value) is int and _INT64.min <= value <= _INT64.max:
        return value
    return None


def _objects(raw: list[Any], name: str, report: ValidationReport) -> Records:
    if set(map(type, raw)) <= {dict}:
        return raw
    wrong = [row for row, record in enumerate(raw) if not isinstance(record, dict)]
    report.add("record-type", (f"{name}[{row}]: {raw[row]!r:.60}" for row in wrong), len(wrong))
    return [record if isinstance(record, dict) else {} for record in raw]


def _integers(records: Records, key: str, code: str, name: str, report: ValidationReport) -> tuple[np.ndarray, np.ndarray]:
    values, valid, converted = integer_column(records, key)

    def describe(row: int) -> str:
        shown = f"{records[row][key]!r:.60}" if key in records[row] else "missing"
        place = f"{name}[{row}]" if key == "id" else _place(records, row)
        return f"{place}: {key} {shown}"

    _report_rows(~valid, code, describe, report)
    _report_rows(converted, "id-converted", describe, report)
    return values, valid


def _annotation_ids(records: Records, report: ValidationReport) -> np.ndarray:
    """The ids of the file when they are positive and different, otherwise 1, 2, 3, ..."""
    ids_A, valid_A = _integers(records, "id", "annotation-id", "annotations", report)
    _report_repeated(ids_A, valid_A, "annotation-id-duplicate", "annotation id", report)
    for mask_A, code in ((ids_A == 0, "annotation-id-zero"), (ids_A < 0, "annotation-id-negative")):
        _report_rows(valid_A & mask_A, code, lambda row: f"annotations[{row}]: id {ids_A[row]}", report)
    if valid_A.all() and (ids_A > 0).all() and len(np.unique(ids_A)) == len(ids_A):
        return ids_A
    return np.arange(1, len(ids_A) + 1, dtype=np.int64)


def _boxes(records: Records, report: ValidationReport) -> tuple[np.ndarray, np.ndarray]:
    malformed_A = np.zeros(len(records), dtype=bool)
    raw: list[Any] = [record.get("bbox") for record in records]
    are_quadruples = set(map(type, raw)) <= {list} and set(map(len, raw)) <= {4}
    if are_quadruples and set(map(type, chain.from_iterable(raw))) <= {int, float}:
        try:
            numbers = np.fromiter(chain.from_iterable(raw), dtype=np.float64, count=4 * len(raw))
            return numbers.reshape(-1, 4), malformed_A
        except OverflowError:
            pass  # an integer of hundreds of digits: not finite, see below
    boxes_A4 = np.zeros((len(raw), 4))
    for row, box in enumerate(raw):
        if isinstance(box, list) and len(box) == 4 and all(type(number) in (int, float) for number in box):
            boxes_A4[row] = [_as_float(number) for number in box]
        else:
            malformed_A[row] = True

    def describe(row: int) -> str:
        shown = f"{raw[row]!r:.80}" if "bbox" in records[row] else "missing"
        return f"{_place(records, row)}: bbox {shown}"

    _report_rows(malformed_A, "box-malformed", describe, report)
    return boxes_A4, malformed_A


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return float("inf")


def _areas(records: Records, report: ValidationReport) -> np.ndarray:
    """Positive areas; NaN where the area of the box has to stand in."""
    raw: list[Any] = [record.get("area") for record in records]
    if set(map(type, raw)) <= {int, float}:
        areas_A = np.array([_as_float(area) for area in raw], dtype=np.float64)
        missing_A = np.zeros(len(raw), dtype=bool)
    else:
        missing_A = np.array([area is None for area in raw], dtype=bool)
        areas_A = np.array([_as_float(area) if type(area) in (int, float) else np.nan for area in raw])
    invalid_A = ~missing_A & ~(np.isfinite(areas_A) & (areas_A > 0))
    _report_rows(missing_A, "area-missing", lambda row: _place(records, row), report)
    _report_rows(invalid_A, "area-invalid", lambda row: f"{_place(records, row)}: area {raw[row]!r:.40}", report)
    areas_A[invalid_A] = np.nan
    return areas_A


def _crowd_flags(records: Records, report: ValidationReport) -> np.ndarray:
    raw = [record.get("iscrowd") for record in records]
    if set(map(type, raw)) <= {int, bool} and set(raw) <= {0, 1}:
        return np.array(raw, dtype=bool)
    missing_A = np.array([flag is None for flag in raw], dtype=bool)
    valid_A = np.array([type(flag) in (int, float, bool) and flag in (0, 1) for flag in raw], dtype=bool)
    _report_rows(missing_A, "iscrowd-missing", lambda row: _place(records, row), report)
    _report_rows(~missing_A & ~valid_A, "iscrowd-invalid", lambda row: f"{_place(records, row)}: {raw[row]!r:.40}", report)
    return np.array([bool(flag) if ok else False for flag, ok in zip(raw, valid_A, strict=True)], dtype=bool)


def _rows_of(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where each wanted id stands in `ids` (the first place of a repeated one), -1 where it does not."""
    if len(ids) == 0:
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    found = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[found] == wanted, found, -1)


def _report_repeated(ids: np.ndarray, valid: np.ndarray, code: str, name: str, report: ValidationReport) -> None:
    values, counts = np.unique(ids[valid], return_counts=True)
    repeated = values[counts > 1]
    times = counts[counts > 1]
    report.add(code, (f"{name} {i}, {n} times" for i, n in zip(repeated, times, strict=True)), len(repeated))


def _report_rows(mask: np.ndarray, code: str, describe: Callable[[int], str], report: ValidationReport) -> None:
    rows = np.flatnonzero(mask)
    report.add(code, _described(rows, describe), len(rows))


def _described(rows: np.ndarray, describe: Callable[[int], str]) -> Iterator[str]:
    return (describe(int(row)) for row in rows)


def _place(records: Records, row: int) -> str:
    """How an annotation is called in a message: by its id and image, or by its position when it has no id."""
    record = records[row]
    name = f"annotation {record['id']!r:.30}" if record.get("id") is not None else f"annotations[{row}]"
    return f"{name} (image {record['image_id']!r:.30})" if record.get("image_id") is not None else name
