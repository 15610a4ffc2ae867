"""COCO boxes as a `datasets.Dataset`: `load_coco`.

The file is checked and repaired by the validator, on the one parsed document, and written column by column to an Arrow
file in a cache that is keyed by the content of the annotation file. Images are stored as paths and decoded when a row is read.

Shape letters: I images, A annotations (of all images, sorted by image), 4 x, y, width, height in pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Value
from datasets.table import MemoryMappedTable
from filelock import FileLock

from sim_hf.data.annotation_file import AnnotationError, content_digest, parse_annotations, read_annotation_bytes
from sim_hf.data.box_format import check_box_format
from sim_hf.data.category_ids import category_description
from sim_hf.data.image_files import ImageFolder
from sim_hf.data.validation import CheckedAnnotations, check_annotations
from sim_hf.data.validation_report import ValidationReport

logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # part of the cache key: raise it when what is written changes
_ROWS_PER_BATCH = 2048
_TABLE_NAME = "rows.arrow"
_SUMMARY_NAME = "summary.json"


def load_coco(
    image_dir: str | os.PathLike[str],
    annotation_file: str | os.PathLike[str],
    *,
    with_masks: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    box_format: str = "xywh",
    strict: bool = False,
) -> Dataset:
    """A COCO annotation file -> one row per image, in the order of the file, in the Hub's detection convention.

    Columns: image_id, image (decoded when read), width, height, objects {id, bbox xywh, category, area, iscrowd};
    `with_masks` adds objects.segmentation, JSON text, "" for none. Without it segmentations are not even parsed.
    Labels are the categories sorted by id; `category_ids(dataset)` gives the ids of the file back.

    Boxes that leave their image are clipped, those without area or wholly outside are dropped; one warning counts them, and
    `strict=True` refuses them. What cannot be repaired raises `AnnotationError` with the file and the place.

    Examples:
        >>> from sim_hf.data import load_coco, write_scenes
        >>> folder = write_scenes("scenes", num_train=2, num_val=0, size=128, progress=False)
        >>> rows = load_coco(folder / "images", folder / "instances_train.json")
        >>> rows.column_names
        ['image_id', 'image', 'width', 'height', 'objects']
        >>> sorted(rows[0]["objects"])
        ['area', 'bbox', 'category', 'id', 'iscrowd']
    """
    check_box_format(box_format)
    folder = ImageFolder(Path(image_dir))
    annotation_file = Path(annotation_file)
    content = read_annotation_bytes(annotation_file)
    options = [CACHE_VERSION, str(folder.root), with_masks, box_format, strict]
    key = hashlib.sha256(json.dumps([content_digest(content), *options]).encode()).hexdigest()[:32]
    root = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "sim_hf_coco"
    root.mkdir(parents=True, exist_ok=True)
    entry = root / key
    dataset = _open_entry(entry, key)
    if dataset is None:
        with FileLock(root / f"{key}.lock"):  # of several processes one builds, the others find it done
            dataset = _open_entry(entry, key)
            if dataset is None:
                report = ValidationReport(str(annotation_file), strict=strict)
                checked = _check(annotation_file, content, folder, report, box_format=box_format, with_masks=with_masks)
                _write_entry(entry, checked, folder, {"repairs": report.repairs()})
                dataset = _open_entry(entry, key)
    if dataset is None:
        raise OSError(f"{entry}: the rows were written but cannot be read back")
    return dataset


def _check(
    annotation_file: Path,
    content: bytes,
    folder: ImageFolder,
    report: ValidationReport,
    *,
    box_format: str,
    with_masks: bool,
) -> CheckedAnnotations:
    parsed = parse_annotations(annotation_file, content)
    checked = check_annotations(parsed, folder, report, box_format=box_format, with_masks=with_masks)
    error = report.first_error()
    if error is not None:
        raise AnnotationError(error)
    return checked


def coco_features(names: list[str], *, with_masks: bool = False) -> Features:
    """The columns of a data set in the detection convention."""
    objects = {
        "id": List(Value("int64")),
        "bbox": List(List(Value("float32"), length=4)),
        "category": List(ClassLabel(names=names)),
        "area": List(Value("float32")),
        "iscrowd": List(Value("bool")),
    }
    if with_masks:
        objects["segmentation"] = List(Value("string"))
    columns = {"image_id": Value("int64"), "image": Image(), "width": Value("int64"), "height": Value("int64")}
    return Features({**columns, "objects": objects})


def _write_entry(entry: Path, checked: CheckedAnnotations, folder: ImageFolder, summary: dict[str, str | None]) -> None:
    """Write the rows beside the entry and rename: the entry is there complete or not at all. Called under the lock."""
    for leftover in entry.parent.glob(f"{entry.name}.tmp*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(entry, ignore_errors=True)  # there but not readable, or it would have been used
    temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp", dir=entry.parent))
    try:
        features = coco_features(checked.categories.names, with_masks=checked.segmentations is not None)
        table_file = temporary / _TABLE_NAME
        with pa.OSFile(str(table_file), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
            for batch in _batches(checked, folder, features.arrow_schema):
                writer.write_batch(batch)
        description = category_description(checked.categories.ids)
        info = {"description": description, "features": features.to_dict(), "num_bytes": table_file.stat().st_size}
        (temporary / _SUMMARY_NAME).write_text(json.dumps({**info, **summary}), encoding="utf-8")
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        os.replace(temporary, entry)
    except OSError as error:
        raise OSError(f"{entry.parent}: the rows of the data set cannot be written there ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _open_entry(entry: Path, key: str) -> Dataset | None:
    """The cached rows, memory-mapped; None when they are not there or damaged."""
    try:
        summary = json.loads((entry / _SUMMARY_NAME).read_text(encoding="utf-8"))
        if (entry / _TABLE_NAME).stat().st_size != summary["num_bytes"]:
            return None
        table = MemoryMappedTable.from_file(str(entry / _TABLE_NAME))
        features = Features.from_dict(summary["features"])
        repairs = summary["repairs"]
    except (OSError, ValueError, KeyError, TypeError):  # pa.ArrowInvalid is a ValueError
        return None
    if repairs is not None:
        logger.warning(repairs)
    info = DatasetInfo(description=summary["description"], features=features)
    return Dataset(table, info=info, fingerprint=key[:16])


def _batches(checked: CheckedAnnotations, folder: ImageFolder, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows, some thousand images at a time, so that no column of the whole file stands in memory twice."""
    images, annotations = checked.images, checked.annotations
    order_A = np.argsort(annotations.image_rows_A, kind="stable")  # the file's order within an image
    counts_I = np.bincount(annotations.image_rows_A, minlength=len(images.ids_I))
    ends_I = np.concatenate([[0], np.cumsum(counts_I)])
    for first in range(0, len(images.ids_I), _ROWS_PER_BATCH):
        rows = slice(first, min(first + _ROWS_PER_BATCH, len(images.ids_I)))
        selected = order_A[ends_I[rows.start] : ends_I[rows.stop]]
        offsets = ends_I[rows.start : rows.stop + 1] - ends_I[rows.start]
        paths = pa.array([folder.path(name) for name in images.file_names[rows]], type=pa.string())
        no_bytes = pa.nulls(len(paths), pa.binary())
        columns = {
            "image_id": pa.array(images.ids_I[rows]),
            "image": pa.StructArray.from_arrays([no_bytes, paths], ["bytes", "path"]),
            "width": pa.array(images.widths_I[rows]),
            "height": pa.array(images.heights_I[rows]),
            "objects": _objects(checked, selected, offsets),
        }
        yield pa.RecordBatch.from_arrays([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def _objects(checked: CheckedAnnotations, selected: np.ndarray, offsets: np.ndarray) -> pa.StructArray:
    annotations = checked.annotations
    boxes = pa.array(annotations.boxes_A4[selected].astype(np.float32).reshape(-1))
    columns = {
        "id": pa.array(annotations.ids_A[selected]),
        "bbox": pa.FixedSizeListArray.from_arrays(boxes, 4),
        "category": pa.array(annotations.labels_A[selected].astype(np.int64)),
        "area": pa.array(annotations.areas_A[selected].astype(np.float32)),
        "iscrowd": pa.array(annotations.is_crowd_A[selected]),
    }
    if checked.segmentations is not None:
        columns["segmentation"] = pa.array([checked.segmentations[row] for row in selected], type=pa.string())
    starts = pa.array(offsets.astype(np.int32))
    lists = [pa.ListArray.from_arrays(starts, column) for column in columns.values()]
    return pa.StructArray.from_arrays(lists, list(columns))
