"""The check of a COCO file: one pass over the parsed document that finds, counts and names every fault.

The loader runs the same check on the same parsed document, so what `sim-hf check` says is what training does.

Shape letters: I images, A annotations, 4 x, y, width, height in pixels.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from sim_hf.data.annotation_file import AnnotationFile, UnreadableAnnotationError, parse_annotations, read_annotation_bytes
from sim_hf.data.annotation_table import (
    AnnotationTable,
    CategoryTable,
    ImageTable,
    read_annotations,
    read_categories,
    read_images,
)
from sim_hf.data.box_format import check_box_format, duplicate_boxes, looks_like_xyxy, repair_boxes, xyxy_to_xywh
from sim_hf.data.image_files import ImageFault, ImageFolder, find_faulty_names, inspect_images
from sim_hf.data.images import DEFAULT_MAX_PIXELS
from sim_hf.data.segmentation_check import check_segmentation
from sim_hf.data.segmentation_text import SegmentationText
from sim_hf.data.validation_report import ValidationReport

ImageCheck = Literal["header", "decode", "none"]
_IMAGE_CHECKS = ("header", "decode", "none")


@dataclass(frozen=True)
class CheckedAnnotations:
    """The usable content of a file: annotations that are kept have repaired xywh boxes, filled areas and image rows.

    `segmentations[a]` is the JSON text of annotation a's masks ("" = none); None when masks were not asked for.
    """

    categories: CategoryTable
    images: ImageTable
    annotations: AnnotationTable
    segmentations: list[str] | None = None


def validate_coco(
    annotation_file: str | os.PathLike[str],
    image_dir: str | os.PathLike[str] | None = None,
    *,
    images: ImageCheck = "header",
    box_format: str = "xywh",
    strict: bool = False,
    with_masks: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: bool = False,
) -> ValidationReport:
    """Find, count and name every fault of a COCO file (and, with `image_dir`, of its images).

    images: "header" compares sizes, "decode" reads every pixel, "none" only looks whether the files are there. strict: what
    would be repaired counts as an error. with_masks: segmentations are checked too; otherwise they are not even parsed.
    """
    if images not in _IMAGE_CHECKS:
        raise ValueError(f"images must be one of {', '.join(_IMAGE_CHECKS)}, got {images!r}")
    check_box_format(box_format)
    report = ValidationReport(str(annotation_file), strict=strict)
    try:
        parsed = parse_annotations(annotation_file, read_annotation_bytes(annotation_file))
    except UnreadableAnnotationError as error:
        report.add("unreadable", [str(error)], 1)
        return report
    folder = None if image_dir is None else ImageFolder(Path(image_dir))
    checked = check_annotations(parsed, folder, report, box_format=box_format, with_masks=with_masks)
    if folder is not None and images != "none":
        _check_image_content(checked.images, folder, report, images == "decode", max_pixels, progress)
    return report


def check_annotations(
    parsed: AnnotationFile,
    folder: ImageFolder | None,
    report: ValidationReport,
    *,
    box_format: str = "xywh",
    with_masks: bool = False,
) -> CheckedAnnotations:
    """Everything but the content of the image files; the result is meaningful only when `report.ok`."""
    document = parsed.document
    report.add("byte-order-mark", [], int(parsed.has_byte_order_mark))
    report.add("non-finite-literal", [], int(parsed.has_non_finite_literals))
    report.add("repeated-key", (repr(key) for key in parsed.repeated_keys), len(parsed.repeated_keys))
    categories = read_categories(document["categories"], report)
    images = read_images(document["images"], report)
    _check_names(images, folder, report)
    annotations = read_annotations(document["annotations"], images, categories, report)
    report.num_images, report.num_categories = len(images.ids_I), len(document["categories"])
    report.num_annotations = len(annotations.ids_A)
    keep_A = _check_boxes(annotations, images, box_format, report)
    segmentations = None
    if with_masks:
        segmentations = _check_segmentations(annotations, images, keep_A, parsed.segmentations, report)
    kept = _select(annotations, keep_A)
    _add_statistics(kept, images, categories, report)
    report.num_usable_boxes = int((~kept.is_crowd_A).sum())
    return CheckedAnnotations(categories, images, kept, segmentations)


def _check_names(images: ImageTable, folder: ImageFolder | None, report: ValidationReport) -> None:
    rows = [row for row, name in enumerate(images.file_names) if name or images.usable_I[row]]
    faults = find_faulty_names(images.file_names, rows, folder)
    _add_image_faults(faults, images, report)
    for fault in faults:
        images.usable_I[fault.row] = False


def _add_image_faults(faults: list[ImageFault], images: ImageTable, report: ValidationReport) -> None:
    by_code: dict[str, list[ImageFault]] = defaultdict(list)
    for fault in faults:
        by_code[fault.code].append(fault)
    for code, some in by_code.items():
        places = (f"image {images.ids_I[f.row]} ({images.file_names[f.row]:.120}): {f.detail}" for f in some)
        report.add(code, places, len(some))


def _check_image_content(
    images: ImageTable, folder: ImageFolder, report: ValidationReport, decode: bool, max_pixels: int, progress: bool
) -> None:
    rows = [int(row) for row in np.flatnonzero(images.usable_I)]
    paths = {row: folder.path(images.file_names[row]) for row in rows}
    sizes = {row: (int(images.widths_I[row]), int(images.heights_I[row])) for row in rows}
    results = inspect_images(paths, sizes, decode=decode, max_pixels=max_pixels)
    bar = tqdm(results, total=len(rows), desc="images", unit="image", disable=not progress)
    _add_image_faults([fault for fault in bar if fault is not None], images, report)


def _check_boxes(annotations: AnnotationTable, images: ImageTable, box_format: str, report: ValidationReport) -> np.ndarray:
    """Repair the boxes in place, fill the areas -> which annotations are usable (A,)."""
    known_A = (annotations.image_rows_A >= 0) & (annotations.labels_A >= 0)
    rows_A = annotations.image_rows_A.clip(min=0)
    if len(images.ids_I) == 0:
        return np.zeros(len(annotations.ids_A), dtype=bool)
    sizes_A2 = np.stack([images.widths_I[rows_A], images.heights_I[rows_A]], axis=1).astype(np.float64)
    judged_A = known_A & ~annotations.malformed_A & (sizes_A2 > 0).all(axis=1)
    if box_format == "xyxy":
        annotations.boxes_A4 = xyxy_to_xywh(annotations.boxes_A4)
    elif looks_like_xyxy(annotations.boxes_A4[judged_A], sizes_A2[judged_A]):
        rows = np.flatnonzero(judged_A)
        boxes = (f"annotation {annotations.ids_A[row]}: {_numbers(annotations.boxes_A4[row])}" for row in rows)
        report.add("box-format", boxes, len(rows))
        return judged_A
    repair = repair_boxes(annotations.boxes_A4, sizes_A2)

    def place(row: int) -> str:
        image = images.place(int(rows_A[row]))
        return f"annotation {annotations.ids_A[row]} of {image}: {_numbers(annotations.boxes_A4[row])}"

    for code, mask_A in (
        ("box-not-finite", repair.not_finite_A),
        ("box-negative", repair.negative_A),
        ("box-empty", repair.empty_A),
        ("box-outside", repair.outside_A),
        ("box-partly-outside", repair.clipped_A),
    ):
        rows = np.flatnonzero(mask_A & judged_A)
        report.add(code, (place(int(row)) for row in rows), len(rows))
    keep_A = repair.keep_A & judged_A
    groups_A2 = np.stack([annotations.image_rows_A, annotations.labels_A], axis=1)
    duplicates = np.flatnonzero(keep_A)[duplicate_boxes(repair.boxes_A4[keep_A], groups_A2[keep_A])]
    report.add("box-duplicate", (place(int(row)) for row in duplicates), len(duplicates))
    annotations.boxes_A4 = repair.boxes_A4
    annotations.areas_A = np.where(
        np.isnan(annotations.areas_A), repair.boxes_A4[:, 2] * repair.boxes_A4[:, 3], annotations.areas_A
    )
    return keep_A


def _check_segmentations(
    annotations: AnnotationTable,
    images: ImageTable,
    keep_A: np.ndarray,
    pieces: SegmentationText,
    report: ValidationReport,
) -> list[str]:
    """The JSON text of each usable annotation's segmentation, in the order of the file."""
    texts: list[str] = []
    missing, short, malformed = [], [], []
    for row in np.flatnonzero(keep_A):
        image_row = annotations.image_rows_A[row]
        verdict = check_segmentation(
            annotations.segmentations[row], pieces, int(images.heights_I[image_row]), int(images.widths_I[image_row])
        )
        texts.append(verdict.text)
        place = f"annotation {annotations.ids_A[row]}"
        if verdict.fault is not None:
            malformed.append(f"{place}: {verdict.fault}")
        elif verdict.num_short:
            short.append(f"{place}: {verdict.num_short} polygons")
        elif not verdict.text:
            missing.append(place)
    report.add("segmentation-missing", missing, len(missing))
    report.add("segmentation-short", short, len(short))
    report.add("segmentation-malformed", malformed, len(malformed))
    return texts


def _select(annotations: AnnotationTable, keep_A: np.ndarray) -> AnnotationTable:
    return replace(
        annotations,
        ids_A=annotations.ids_A[keep_A],
        image_rows_A=annotations.image_rows_A[keep_A],
        labels_A=annotations.labels_A[keep_A],
        boxes_A4=annotations.boxes_A4[keep_A],
        malformed_A=annotations.malformed_A[keep_A],
        areas_A=annotations.areas_A[keep_A],
        is_crowd_A=annotations.is_crowd_A[keep_A],
        segmentations=[],
    )


def _add_statistics(kept: AnnotationTable, images: ImageTable, categories: CategoryTable, report: ValidationReport) -> None:
    crowds = np.flatnonzero(kept.is_crowd_A)
    report.add("crowd", (f"annotation {kept.ids_A[row]}" for row in crowds), len(crowds))
    empty = np.flatnonzero(np.bincount(kept.image_rows_A, minlength=len(images.ids_I)) == 0)
    report.add("image-without-annotations", (images.place(int(row)) for row in empty), len(empty))
    unused = np.flatnonzero(np.bincount(kept.labels_A, minlength=len(categories.ids)) == 0)
    names = (f"category {categories.ids[row]} ({categories.names[row]})" for row in unused)
    report.add("category-unused", names, len(unused))


def _numbers(box_4: np.ndarray) -> str:
    return "[" + ", ".join(f"{number:.6g}" for number in box_4) + "]"
