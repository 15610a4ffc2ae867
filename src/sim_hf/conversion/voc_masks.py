"""The instance masks of a Pascal VOC data set (SegmentationObject, SegmentationClass) for the objects that are measured on.

Shape letters: H W rows and columns of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sim_hf.conversion.source import SourceError, SourceObject
from sim_hf.data.masks import encode_rle, rle_boxes

_BORDER = 255  # between objects and around them: belongs to nobody
_BACKGROUND = 0


class InstanceMasks:
    """The PNG files of the images that are measured on."""

    def __init__(self, instances: Path, classes: Path, notes: Counter[str]) -> None:
        self.instances, self.classes, self.notes = instances, classes, notes

    @classmethod
    def of(cls, root: Path, names: Sequence[str], notes: Counter[str]) -> InstanceMasks | None:
        """The masks below `root` if every image of `names` has one: half of them would measure nothing. None without."""
        instances = root / "SegmentationObject"
        there = sum((instances / f"{name}.png").is_file() for name in names)
        if there and there < len(names):
            notes["validation images have no mask file, so the validation file has boxes only"] += len(names) - there
        return cls(instances, root / "SegmentationClass", notes) if there and there == len(names) else None

    def attach(
        self, name: str, objects: Sequence[SourceObject], size: tuple[int, int], class_names: Sequence[str]
    ) -> list[SourceObject]:
        """The objects with their masks. size: (height, width). class_names: what the values 1, 2, ... of the class image mean,
        if all objects are of these classes.

        The k-th object has the pixels of value k. Where the class image says that they are of another class, or there is no
        k-th object, the mask stands for itself, with its own tight box; an object that is left without pixels is ignored.
        """
        path = self.instances / f"{name}.png"
        values_HW = _read_values(path, size)
        classes_HW = None
        if (self.classes / path.name).is_file() and {item.class_name for item in objects} <= set(class_names):
            classes_HW = _read_values(self.classes / path.name, size)
        found: dict[int, SourceObject] = {}
        for value in np.unique(values_HW).tolist():
            if value in (_BACKGROUND, _BORDER):
                continue
            mask_HW = values_HW == value
            item = objects[value - 1] if value <= len(objects) else None
            drawn = None if classes_HW is None else _majority(classes_HW[mask_HW], class_names)
            rle = encode_rle(mask_HW)
            if item is not None and drawn in (None, item.class_name):
                found[value] = replace(item, segmentation=rle)
            elif drawn is not None:
                x, y, width, height = rle_boxes([rle])[0].tolist()
                found[value] = SourceObject(drawn, (x, y, width, height), rle)
                self.notes["masks without an object of their class in the XML file: their own box was taken"] += 1
            else:
                raise SourceError(f"{path}: pixels of value {value}, but the XML file has {len(objects)} objects")
        without = [
            replace(item, crowd=True)
            for number, item in enumerate(objects, start=1)
            if number not in found or found[number].class_name != item.class_name
        ]
        self.notes["objects without a mask are ignored in the measurement (iscrowd)"] += len(without)
        return [*found.values(), *without]


def _majority(values: np.ndarray, class_names: Sequence[str]) -> str | None:
    """The class of most pixels, None when it is none of the known."""
    value = int(np.bincount(values.ravel(), minlength=1).argmax())
    return class_names[value - 1] if 1 <= value <= len(class_names) else None


def _read_values(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The palette numbers (or gray values) of a PNG (H, W) uint8."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise SourceError(f"{path}: expected a palette or gray PNG of object numbers, got mode {image.mode}")
            if image.size != (size[1], size[0]):
                raise SourceError(f"{path}: {image.size[0]} x {image.size[1]} pixels, but the picture is {size[1]} x {size[0]}")
            return np.asarray(image)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path}: cannot be decoded ({error})") from error
