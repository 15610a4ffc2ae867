"""YOLO data sets: data.yaml (or a list of class names), one text file of rows a picture.

A row is `class x y w h` (centre and size as shares of the image), `class x1 y1 x2 y2 x3 y3 ...` (a polygon, or the four corners
of a turned box; its box is taken), or, where data.yaml has kpt_shape, a box and keypoints (which are left out).
An image without a text file, or with an empty one, holds no objects: that is YOLO's way to say so.

The parser is our own: supervision's (0.31) brings OpenCV and more, names no files in its errors and takes one flat folder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sim_hf.conversion.source import SourceError, SourceImage, SourceObject, first_line, pictures_below
from sim_hf.data.images import read_image_size

_NAME_LISTS = ("classes.txt", "obj.names")  # of tools that write no data.yaml
_BOX_VALUES = 4
_MIN_POLYGON_VALUES = 6
# True boxes may leave their image a little; what lies farther outside was written in pixels.
_LEAST, _MOST = -0.5, 1.5


@dataclass(frozen=True)
class YoloRow:
    """x, y, width, height as shares of the image, from the upper left corner."""

    label: int
    box: tuple[float, float, float, float]
    is_polygon: bool = False


class YoloSource:
    """A YOLO data set: its folder, or its data.yaml. Category ids are the class numbers plus 1, as COCO counts."""

    kind = "YOLO"

    def __init__(self, source: Path) -> None:
        self.notes: Counter[str] = Counter()
        description, content = _description(source)
        self.names = _class_names(description, content)
        self.num_keypoint_values = _keypoint_values(description, content)
        self.splits: Mapping[str, Sequence[tuple[Path, str]]] = _splits(description, content)
        self._check_labels()
        self.notes["split was not converted: test"] += bool(content.get("test"))
        both = set(self.splits["train"]) & set(self.splits.get("val", ()))
        self.notes["images stand in train and in val: what is measured on them says nothing of new images"] += len(both)

    def categories(self) -> dict[int, str]:
        return dict(enumerate(self.names, start=1))

    def read(self, split: str, entry: tuple[Path, str]) -> SourceImage:
        path, name = entry
        height, width = read_image_size(path)
        objects = []
        for row in self._rows(label_file(path)):
            x, y, w, h = row.box
            self.notes["polygons became boxes: the shapes are not used in training from boxes"] += row.is_polygon
            objects.append(SourceObject(self.names[row.label], (x * width, y * height, w * width, h * height)))
        return SourceImage(name, path, width, height, objects)

    def _rows(self, path: Path) -> list[YoloRow]:
        if not path.exists():
            return []
        rows = []
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                try:
                    rows.append(parse_row(line, len(self.names), self.num_keypoint_values))
                except ValueError as error:
                    raise SourceError(f"{path}:{number}: {error}") from None
        return rows

    def _check_labels(self) -> None:
        """Not one text file in a split is no data set without objects, but another layout than YOLO's."""
        wanted: set[Path] = set()
        for split, pictures in self.splits.items():
            files = [label_file(path) for path, _ in pictures]
            if not any(file.exists() for file in files):
                raise SourceError(f"{split}: none of its {len(files)} images has a text file; one was expected as {files[0]}")
            wanted.update(files)
        there = {file for folder in {file.parent for file in wanted} for file in folder.glob("*.txt")}
        surplus = [file for file in there - wanted if file.name not in _NAME_LISTS]
        self.notes["text files belong to no image of train or val and were left out"] += len(surplus)


def parse_row(line: str, num_classes: int, num_keypoint_values: int = 0) -> YoloRow:
    """One row of a label file. ValueError says what is wrong with it."""
    texts = line.split()
    try:
        numbers = [float(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{first_line(error)}; a row holds numbers: class x y width height") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"a row holds finite numbers, got {line.strip()!r:.80}")
    label, values = numbers[0], numbers[1:]
    if label != int(label) or not 0 <= label < num_classes:
        raise ValueError(f"class {texts[0]} is not among the {num_classes} classes 0..{num_classes - 1}")
    is_polygon = False
    if len(values) == _BOX_VALUES + num_keypoint_values:
        values = values[:_BOX_VALUES]
    elif num_keypoint_values == 0 and len(values) >= _MIN_POLYGON_VALUES and len(values) % 2 == 0:
        is_polygon = True
    else:
        expected = f"a box and {num_keypoint_values} values of keypoints" if num_keypoint_values else "a box or a polygon"
        confidence = "; is the last one a confidence?" if len(values) == _BOX_VALUES + 1 else ""
        raise ValueError(f"{len(values)} numbers after the class, expected {expected}{confidence}")
    if min(values) < _LEAST or max(values) > _MOST:
        raise ValueError(f"{line.strip()!r:.80} is in pixels; YOLO has shares of the image's width and height, 0 to 1")
    if is_polygon:
        left, top, right, bottom = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        return YoloRow(int(label), (left, top, right - left, bottom - top), is_polygon=True)
    x, y, w, h = values
    return YoloRow(int(label), (x - w / 2, y - h / 2, w, h))


def label_file(picture: Path) -> Path:
    """Where the rows of a picture stand: the last folder named images becomes labels; or beside the picture."""
    beside = picture.with_suffix(".txt")
    folders = list(picture.parent.parts)
    if "images" not in folders:
        return beside
    folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    usual = Path(*folders, beside.name)
    return beside if beside.exists() and not usual.exists() else usual


def _description(source: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes the data set, and what data.yaml would say."""
    if source.is_file():
        return source, _read_yaml(source)
    if not source.is_dir():
        raise SourceError(f"{source}: no such file or folder")
    files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")], key=lambda path: (path.stem != "data", path.name))
    for file in files:
        content = _read_yaml(file)
        if file.stem == "data" or "names" in content:
            return file, content
    lists = [source / name for name in _NAME_LISTS if (source / name).is_file()]
    if not lists:
        raise SourceError(f"{source}: no data.yaml and no {' or '.join(_NAME_LISTS)}: the names of the classes stand nowhere")
    names = [line.strip() for line in _lines(lists[0]) if line.strip()]
    return lists[0], {"names": names, "train": "images" if (source / "images").is_dir() else "."}


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping with every value as it is written: to YAML 1.1 a class called no would be False."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.BaseLoader)):
            raise SourceError(f"{path}: cannot be read as YAML here (aliases, which can grow without end)")
        content = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 - makes texts, lists and mappings only
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise SourceError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: expected a mapping with train, val and names, got {type(content).__name__}")
    return content


def _class_names(path: Path, content: Mapping[str, Any]) -> list[str]:
    if "names" not in content:
        raise SourceError(f"{path}: no `names`: a list of the class names in the order of their numbers")
    names = content["names"]
    if isinstance(names, Mapping):
        try:
            by_number = {int(number): name for number, name in names.items()}
        except (TypeError, ValueError):
            raise SourceError(f"{path}: `names` must be numbered 0, 1, ..., got {list(names)!r:.80}") from None
        if sorted(by_number) != list(range(len(names))):
            raise SourceError(f"{path}: `names` must number the classes 0..{len(names) - 1}, got {sorted(by_number)!r:.80}")
        names = [by_number[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{path}: `names` must list the class names, got {names!r:.80}")
    texts = [name.strip() for name in names]
    repeated = [name for name, count in Counter(texts).items() if count > 1 or not name]
    if repeated:
        raise SourceError(f"{path}: `names` must differ and not be empty, got {repeated[0]!r} in {texts!r:.120}")
    if str(content.get("nc", len(texts))) != str(len(texts)):
        raise SourceError(f"{path}: nc is {content['nc']}, but `names` has {len(texts)} classes")
    return texts


def _keypoint_values(path: Path, content: Mapping[str, Any]) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, str) and n.isdigit() for n in shape):
        raise SourceError(f"{path}: kpt_shape must be [number of keypoints, 2 or 3], got {shape!r:.80}")
    return int(shape[0]) * int(shape[1])


def _splits(path: Path, content: Mapping[str, Any]) -> dict[str, list[tuple[Path, str]]]:
    """split -> (picture, its name below the folder it was found in)"""
    if not content.get("train"):
        raise SourceError(f"{path}: no `train`: the folder, or the list, of the training images")
    root = Path(str(content.get("path") or "."))
    root = path.parent / root  # an absolute path stays what it is
    if not root.is_dir():
        root = path.parent  # `path` often names the folder on the machine of the author
    found = {}
    for split in ("train", "val"):
        places = content.get(split) or []
        pictures = [
            picture for place in ([places] if isinstance(places, str) else places) for picture in _pictures(root, place, path)
        ]
        if pictures:
            found[split] = list(dict(pictures).items())
    if "train" not in found:
        raise SourceError(f"{path}: `train` ({content['train']!r:.120}) holds no images")
    return found


def _pictures(root: Path, place: Any, described_in: Path) -> list[tuple[Path, str]]:
    candidates = [root / str(place), described_in.parent / str(place)]
    if str(place).startswith("../"):  # exports that count from a folder which is not there
        candidates.append(root / str(place).removeprefix("../"))
    target = next((path for path in candidates if path.exists()), None)
    if target is None:
        raise SourceError(f"{described_in}: {candidates[0]} does not exist")
    if target.is_dir():
        return [(path, path.relative_to(target).as_posix()) for path in pictures_below(target)]
    listed = []
    for number, line in enumerate(_lines(target), start=1):
        if line.strip():
            entry = Path(line.strip())
            picture = next((base / entry for base in (target.parent, root) if (base / entry).is_file()), None)
            if picture is None:
                raise SourceError(f"{target}:{number}: {entry} does not exist")
            listed.append((picture, picture.name))
    return listed


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not text ({error.reason})") from error
