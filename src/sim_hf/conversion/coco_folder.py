"""A data set of another format as the COCO folder that everything else reads: images/, instances_train.json, instances_val.json.

The folder is made beside its final place and moved there when it is whole and has passed the check of `sim-hf check`; images are
hard links to the files of the source (they cost no space, and a link that leaves the folder would be refused), or copies.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sim_hf.conversion.source import DetectionSource, SourceError, SourceImage, SourceObject
from sim_hf.data.annotation_file import write_coco
from sim_hf.data.box_format import BoxRepair, duplicate_boxes, repair_boxes
from sim_hf.data.image_files import path_fault
from sim_hf.data.images import ImageError
from sim_hf.data.masks import rle_areas
from sim_hf.data.validation import validate_coco

REPORT_NAME = "conversion.json"  # also how a later call knows that it may replace the folder
SPLITS = ("train", "val")
_MAX_FAULTS_SHOWN = 10
_REMARKS = {
    "clipped_A": "boxes reached out of their image and were cut off at its border",
    "not_finite_A": "boxes that are no finite numbers were left out",
    "negative_A": "boxes with a negative side were left out",
    "empty_A": "boxes without width or height were left out",
    "outside_A": "boxes wholly outside their image were left out",
}


@dataclass
class ConvertedSplit:
    """Counts of one split. num_masks: objects with a mask, which only a validation split has."""

    num_images: int = 0
    num_boxes: int = 0
    num_empty_images: int = 0
    num_crowds: int = 0
    num_masks: int = 0


@dataclass
class ConversionReport:
    """What a conversion did. notes: what was left out or changed -> how often."""

    kind: str
    class_names: list[str]
    splits: dict[str, ConvertedSplit]
    linked: bool = True
    notes: Counter[str] = field(default_factory=Counter)


def write_coco_folder(
    source: DetectionSource,
    output: str | os.PathLike[str],
    *,
    copy: bool = False,
    overwrite: bool = False,
    val_fraction: float = 0.0,
    progress: bool = True,
) -> ConversionReport:
    """Convert `source` into the folder `output`, which then holds everything, or, if anything fails, what it held before.

    copy: copy the images instead of linking them. overwrite: replace the result of an earlier conversion (nothing else is ever
    replaced). val_fraction: share of the training images that becomes the validation split of a source without one.
    Raises SourceError with the places of all faults that were found, up to ten of them.
    """
    output = Path(os.path.abspath(output))
    _check_output(output, overwrite)
    entries = _entries(source, val_fraction)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.unfinished-", dir=output.parent))
    try:
        report = _Writer(source, staging, copy=copy, progress=progress).write(entries)
        _check_result(staging)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(staging, 0o777 & ~umask)  # mkdtemp makes folders that only their owner can read
        _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = {"images", REPORT_NAME, *(f"instances_{split}.json" for split in SPLITS)}
    if not output.is_dir() or not (output / REPORT_NAME).is_file() or {path.name for path in output.iterdir()} - ours:
        raise FileExistsError(f"{output} is there and is not just the result of a conversion; choose another folder")
    if not overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite replaces it")


def _entries(source: DetectionSource, val_fraction: float) -> list[tuple[str, Any]]:
    """(split, what the source reads) of every image; a validation split is drawn where the source has none."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"the share of the validation images must lie in 0..1, got {val_fraction}")
    train, val = list(source.splits.get("train", ())), list(source.splits.get("val", ()))
    if not train:
        raise SourceError(f"{source.kind}: there are no images to train on")
    if not val and val_fraction > 0:
        draw = random.Random(0)  # noqa: S311 - a split is no secret
        drawn = set(draw.sample(range(len(train)), max(1, round(val_fraction * len(train)))))
        train, val = ([entry for i, entry in enumerate(train) if (i in drawn) is wanted] for wanted in (False, True))
    return [("train", entry) for entry in train] + [("val", entry) for entry in val]


class _Writer:
    """Fills the staging folder; ids of images and annotations count from 1 through all splits."""

    def __init__(self, source: DetectionSource, folder: Path, *, copy: bool, progress: bool) -> None:
        self.source, self.folder, self.copy, self.progress = source, folder, copy, progress
        self.linked = not copy
        self.notes: Counter[str] = Counter()
        self.documents: dict[str, tuple[list[dict], list[tuple[dict, str]]]] = {}
        self.taken: set[str] = set()
        self.num_annotations = 0

    def write(self, entries: Sequence[tuple[str, Any]]) -> ConversionReport:
        faults = []
        for image_id, (split, entry) in enumerate(self._with_bar(entries), start=1):
            images, annotations = self.documents.setdefault(split, ([], []))
            try:
                image = self.source.read(split, entry)
                file_name = self._place(split, image)
            except (SourceError, ImageError) as error:
                faults.append(str(error))
                continue
            images.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
            annotations.extend(self._annotations(image, image_id, with_masks=split == "val"))
        if faults:
            shown = "; ".join(faults[:_MAX_FAULTS_SHOWN])
            more = f"; and {len(faults) - _MAX_FAULTS_SHOWN} more" if len(faults) > _MAX_FAULTS_SHOWN else ""
            raise SourceError(f"{len(faults)} image(s) cannot be converted: {shown}{more}")
        return self._write_documents()

    def _with_bar(self, entries: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        return iter(tqdm(entries, desc=f"convert {self.source.kind}", unit="image", disable=not self.progress))

    def _place(self, split: str, image: SourceImage) -> str:
        """Link, copy or write the image -> its name below images/."""
        fault = path_fault(image.name)
        if fault is not None:
            raise SourceError(f"{image.name!r:.200}: the name of the image {fault}")
        name, count = f"{split}/{image.name}", 1
        while name in self.taken:  # of several folders in one split
            count += 1
            stem, dot, ending = image.name.rpartition(".")
            name = f"{split}/{stem}-{count}{dot}{ending}"
        self.taken.add(name)
        target = self.folder / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image.content, bytes):
            target.write_bytes(image.content)
            self.linked = False
            return name
        if not self.copy:
            try:
                os.link(os.path.realpath(image.content), target)
                return name
            except OSError:  # another file system, or one without hard links
                self.linked = False
        shutil.copyfile(image.content, target)
        return name

    def _annotations(self, image: SourceImage, image_id: int, *, with_masks: bool) -> list[tuple[dict, str]]:
        """The usable objects as COCO annotations, each with the name of its class; what is left out is counted."""
        if not image.objects:
            return []
        boxes_A4 = np.array([item.box for item in image.objects], dtype=np.float64)
        repair = repair_boxes(boxes_A4, np.array([[image.width, image.height]], dtype=np.float64))
        self._remark(repair)
        names = sorted({item.class_name for item in image.objects})
        labels_A = np.array([names.index(item.class_name) for item in image.objects])
        # Of objects that are told apart by their masks no two are the same, whatever their boxes are.
        masked_A = np.array([-1 if item.segmentation is None else row for row, item in enumerate(image.objects)])
        repeated_A = duplicate_boxes(repair.boxes_A4, np.stack([labels_A, masked_A], axis=1)) & repair.keep_A
        self.notes["boxes given twice (same class, same place) were taken once"] += int(repeated_A.sum())
        found = []
        for row in np.flatnonzero(repair.keep_A & ~repeated_A).tolist():
            item = image.objects[row]
            self.num_annotations += 1
            found.append((_annotation(item, self.num_annotations, image_id, repair.boxes_A4[row], with_masks), item.class_name))
        return found

    def _remark(self, repair: BoxRepair) -> None:
        for mask, remark in _REMARKS.items():
            self.notes[remark] += int(getattr(repair, mask).sum())

    def _write_documents(self) -> ConversionReport:
        categories = self.source.categories()
        id_of = {name: number for number, name in categories.items()}
        listed = [{"id": number, "name": name, "supercategory": ""} for number, name in categories.items()]
        info = {"description": f"converted from {self.source.kind}"}
        splits = {}
        for split, (images, named) in self.documents.items():
            annotations = [{**annotation, "category_id": id_of[name]} for annotation, name in named]
            document = {"info": info, "images": images, "annotations": annotations, "categories": listed}
            write_coco(self.folder / f"instances_{split}.json", document)
            splits[split] = _counted(images, annotations)
        notes = self.source.notes + self.notes  # a sum of counters has no zeros
        report = ConversionReport(self.source.kind, list(categories.values()), splits, self.linked, notes)
        _write_report(self.folder / REPORT_NAME, report)
        return report


def _annotation(item: SourceObject, number: int, image_id: int, box_4: np.ndarray, with_mask: bool) -> dict[str, Any]:
    x, y, width, height = (float(value) for value in box_4)
    annotation = {**item.attributes, "id": number, "image_id": image_id, "bbox": [x, y, width, height], "area": width * height}
    annotation["iscrowd"] = int(item.crowd)
    if with_mask and item.segmentation is not None:
        annotation["segmentation"] = item.segmentation
        annotation["area"] = float(rle_areas([item.segmentation])[0])
    return annotation


def _counted(images: Sequence[Mapping], annotations: Sequence[Mapping]) -> ConvertedSplit:
    crowds = sum(annotation["iscrowd"] for annotation in annotations)
    return ConvertedSplit(
        num_images=len(images),
        num_boxes=len(annotations) - crowds,
        num_empty_images=len(images) - len({annotation["image_id"] for annotation in annotations}),
        num_crowds=crowds,
        num_masks=sum("segmentation" in annotation for annotation in annotations),
    )


def _write_report(path: Path, report: ConversionReport) -> None:
    splits = {name: vars(split) for name, split in report.splits.items()}
    content = {"converted_from": report.kind, "classes": report.class_names, "splits": splits, "notes": dict(report.notes)}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_result(folder: Path) -> None:
    """What training makes sure of at its start, made sure of now."""
    for split in SPLITS:
        file = folder / f"instances_{split}.json"
        if file.exists():
            error = validate_coco(file, folder / "images", with_masks=split == "val").first_error()
            if error is not None:
                raise SourceError(error.replace(f"{folder}{os.sep}", ""))


def _publish(staging: Path, output: Path) -> None:
    """Move the finished folder to its place; an older result goes away only after that."""
    if not output.exists():
        os.rename(staging, output)
        return
    older = Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.older-", dir=output.parent))
    os.rename(output, older / "folder")
    try:
        os.rename(staging, output)
    except BaseException:
        os.rename(older / "folder", output)
        raise
    finally:
        shutil.rmtree(older, ignore_errors=True)
