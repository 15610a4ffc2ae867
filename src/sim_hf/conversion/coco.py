"""COCO files as other tools lay them out, as a conversion source: Roboflow, COCO 2017, CVAT, Label Studio, or one file.

Which file is for training and which for validation is told by the words in its path (train, val, valid, test); where the images
of a file lie, by looking for the first of them. What cannot be told is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets import Dataset

from sim_hf.conversion.rows import RowsSource
from sim_hf.conversion.source import SourceError
from sim_hf.data.annotation_file import AnnotationError, parse_annotations, read_annotation_bytes
from sim_hf.data.coco import load_coco
from sim_hf.data.image_files import ImageFolder

_SPLIT_OF_WORD = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_OTHER_TASKS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")  # of the COCO data set
_DEPTH = 3  # folders below the source that are looked into
_NUM_PROBES = 5  # images that are looked for
_MAX_SHOWN = 8
_NAME_THEM = "name them: sim-hf convert coco TRAIN.json --images FOLDER --val VAL.json --val-images FOLDER --output ..."


@dataclass(frozen=True)
class CocoFile:
    """A COCO file and the folder that its image names count from. placeholders: classes without objects that are the
    supercategory of others (Roboflow writes one)."""

    annotations: Path
    images: Path
    placeholders: frozenset[str] = frozenset()


class CocoSource(RowsSource):
    """COCO files. source: a folder in one of the usual layouts, or the file to train on. images: the folder of its images, found
    where it is not given. val, val_images: the file to measure on, where `source` is a file."""

    kind = "COCO"

    def __init__(
        self,
        source: Path,
        *,
        images: Path | None = None,
        val: Path | None = None,
        val_images: Path | None = None,
        box_format: str = "xywh",
    ) -> None:
        others: list[Path] = []
        if source.is_dir():
            if images is not None or val is not None or val_images is not None:
                raise ValueError(f"{source} is a folder, in which files and images are found; give a file to name its images")
            found, others = _files_of(source)
        elif val is None and val_images is not None:
            raise ValueError("val_images is the folder of val, which is missing")
        else:
            found = {"train": source} if val is None else {"train": source, "val": val}
        given = {"train": images, "val": val_images}
        self.files = {
            split: _open(path, split, given[split], source if source.is_dir() else _surroundings(path))
            for split, path in found.items()
        }
        self.box_format = box_format
        super().__init__(list(self.files))
        for split, names in self.names_of.items():
            if unknown := [name for name in names if name not in self.names]:
                raise SourceError(f"{found[split]}: class {unknown[0]!r} is not a class of {found['train']}")
        self.unused = frozenset.intersection(*(file.placeholders for file in self.files.values()))
        for path in others:
            self.notes[f"file was not converted: {path.relative_to(source)}"] += 1
        for name in sorted(self.unused):
            self.notes[f"class without objects was left out, the supercategory of others: {name}"] += 1

    def load(self, part: str, *, with_masks: bool) -> Dataset:
        file = self.files[part]
        return load_coco(file.images, file.annotations, with_masks=with_masks, box_format=self.box_format)

    def categories(self) -> dict[int, str]:
        return {number: name for number, name in super().categories().items() if name not in self.unused}

    def name_of(self, part: str, path: str | None, image_id: int, content: Path | bytes) -> str:
        """As the file names it."""
        return PurePosixPath(Path(str(path)).relative_to(os.path.realpath(self.files[part].images))).as_posix()


def _files_of(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The file of each split, and the other COCO files that are there."""
    files = [path for place in _folders(folder) for path in sorted(place.glob("*.json")) if _is_detection_file(path)]
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if "train" not in by_split and len(files) == 1:
        return {"train": files[0]}, []
    names = ", ".join(str(path.relative_to(folder)) for path in files[:_MAX_SHOWN])
    for split in ("train", "val"):
        if len(by_split.get(split, ())) > 1 or (split == "train" and split not in by_split):
            which = f"{len(by_split.get(split, ()))} of these COCO files are for {split}" if files else "it has no COCO file"
            raise SourceError(f"{folder}: {which}{f': {names}' if names else ''}; {_NAME_THEM}")
    chosen = {split: by_split[split][0] for split in ("train", "val") if split in by_split}
    return chosen, [path for path in files if path not in chosen.values()]


def _split_of(path: Path) -> str | None:
    """What the words of a relative path say, those of the name before those of its folders."""
    for part in (path.stem, *reversed(path.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None


def _is_detection_file(path: Path) -> bool:
    if path.name.startswith(_OTHER_TASKS) or not path.is_file():
        return False
    try:
        content = read_annotation_bytes(path)
    except AnnotationError:
        return False
    return all(f'"{key}"'.encode() in content for key in ("images", "annotations", "categories"))


def _surroundings(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def _open(path: Path, split: str, images: Path | None, root: Path) -> CocoFile:
    document = parse_annotations(path, read_annotation_bytes(path)).document
    if images is None:
        names = [entry.get("file_name") for entry in document["images"][:_NUM_PROBES] if isinstance(entry, Mapping)]
        images = _images_of(path, split, [name for name in names if isinstance(name, str)], root)
    return CocoFile(path, images, _placeholders(document))


def _images_of(path: Path, split: str, names: Sequence[str], root: Path) -> Path:
    """The folder in which the most of the first images are; of the same split, and near the file, first."""
    if not names:
        return path.parent  # the check of the file says what is wrong with it
    folders = [path.parent, *_folders(root)]

    def fit(folder: Path) -> tuple[int, bool]:
        there = ImageFolder(folder)
        return sum(there.fault(name) is None for name in names), _split_of(folder.relative_to(root) / "_") in (split, None)

    best = max(folders, key=fit)  # the first of equals
    if fit(best)[0] == 0:
        raise SourceError(f"{path}: its image {names[0]!r:.200} was found nowhere below {root}; {_NAME_THEM}")
    return best


def _folders(top: Path) -> list[Path]:
    """The folder and those below it, the upper ones first; hidden ones are left out."""
    found, level = [top], [top]
    for _ in range(_DEPTH):
        level = [
            Path(entry.path)
            for folder in level
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        ]
        found += level
    return found


def _placeholders(document: Mapping) -> frozenset[str]:
    """Names of the categories without objects that are the supercategory of another one."""
    classes = [
        (entry["id"], entry["name"], entry.get("supercategory"))
        for entry in document["categories"]
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str)
    ]
    above = {upper for _, name, upper in classes if isinstance(upper, str) and upper != name}
    ids = (entry.get("category_id") for entry in document["annotations"] if isinstance(entry, Mapping))
    used = {number for number in ids if isinstance(number, int)}
    return frozenset(name for number, name, _ in classes if name in above and number not in used)
