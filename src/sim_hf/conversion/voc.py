"""Pascal VOC data sets: one XML file a picture, in the folders of the VOC devkit or as other tools write them.

A box's <xmin> and <xmax> are the first and the last pixel, counted from 1, so x = xmin - 1 and width = xmax - xmin + 1.

The devkit's instance masks (SegmentationObject: value k is the k-th object of the XML, 255 a border that belongs to nobody) go
into the validation file only: training from boxes never sees a mask.

The parser is our own: supervision's (0.31) drops VOC's flags, orders classes as they happen to appear, decodes every picture
with OpenCV, and knows neither splits nor these masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sim_hf.conversion.source import SourceError, SourceImage, SourceObject, pictures_in
from sim_hf.conversion.voc_masks import InstanceMasks
from sim_hf.conversion.voc_splits import find_splits, picture_folders
from sim_hf.conversion.voc_xml import Element, read_xml
from sim_hf.data.images import PICTURE_ENDINGS, read_image_size

# In the order of the devkit, whose class images use it.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
DIFFICULT = ("keep", "ignore", "drop")
_FLAGS = ("difficult", "truncated", "occluded")


class VocSource:
    """A VOC data set: the folder with Annotations/ (VOCdevkit/VOC2012), or folders of pictures with XML files beside them.

    train, val: names of lists below ImageSets/ ("Segmentation/val"), without them those of the paper's protocol where there are
    instance masks, else Main/train and Main/val. difficult: what becomes of objects with that flag: "keep", "ignore" (neither
    trained on nor counted) or "drop".
    """

    kind = "Pascal VOC"

    def __init__(self, source: Path, *, train: str | None = None, val: str | None = None, difficult: str = "keep") -> None:
        if difficult not in DIFFICULT:
            raise ValueError(f"difficult must be one of {', '.join(DIFFICULT)}, got {difficult!r}")
        self.difficult = difficult
        self.notes: Counter[str] = Counter()
        found = find_splits(source, train=train, val=val)
        self.notes += found.notes
        self.splits: Mapping[str, Sequence[Path]] = found.splits
        self.pictures = _Pictures()
        self.masks = InstanceMasks.of(source, [path.stem for path in found.splits.get("val", ())], self.notes)
        self.class_names: set[str] = set()
        self.declared_names = _label_map(source / "labelmap.txt")

    def categories(self) -> dict[int, str]:
        """In the order of labelmap.txt, where there is one (CVAT), else of VOC, if all are VOC's, else of the alphabet."""
        order = self.declared_names or (VOC_CLASSES if self.class_names <= set(VOC_CLASSES) else sorted(self.class_names))
        names = order if self.declared_names else [name for name in order if name in self.class_names]
        return dict(enumerate(names, start=1))

    def read(self, split: str, entry: Path) -> SourceImage:
        """entry: the XML file."""
        root = read_xml(entry)
        picture = self.pictures.of(entry)
        height, width = read_image_size(picture)
        size = root.find("size")
        said = (int(size.number("width")), int(size.number("height")))
        if said != (width, height):
            raise SourceError(
                f"{size.place}: <size> is {said[0]} x {said[1]}, but {picture.name} is {width} x {height} (upright)"
            )
        objects = [_object(element) for element in root.find_all("object")]
        if split == "val" and self.masks is not None:
            objects = self.masks.attach(entry.stem, objects, (height, width), () if self.declared_names else VOC_CLASSES)
        hard = [item.attributes.get("difficult") == 1 for item in objects]
        if self.difficult == "drop":
            objects = [item for item, is_hard in zip(objects, hard, strict=True) if not is_hard]
            self.notes["difficult objects were left out"] += sum(hard)
        elif self.difficult == "ignore":
            objects = [replace(item, crowd=item.crowd or is_hard) for item, is_hard in zip(objects, hard, strict=True)]
            self.notes["difficult objects are neither trained on nor counted (iscrowd)"] += sum(hard)
        for item in objects:
            if self.declared_names and item.class_name not in self.declared_names:
                raise SourceError(f"{entry}: class {item.class_name!r} is not in labelmap.txt")
            self.class_names.add(item.class_name)
        return SourceImage(picture.name, picture, width, height, objects)


class _Pictures:
    """The picture of an XML file: of the same name, beside it or in JPEGImages/ or images/. Each folder is listed once."""

    def __init__(self) -> None:
        self.listings: dict[Path, dict[str, Path]] = {}

    def of(self, xml: Path) -> Path:
        for folder in (xml.parent, *picture_folders(xml.parent.parent)):
            if folder not in self.listings:
                self.listings[folder] = {path.stem: path for path in pictures_in(folder)}
            if xml.stem in self.listings[folder]:
                return self.listings[folder][xml.stem]
        raise SourceError(f"{xml}: no picture {xml.stem} ({', '.join(sorted(PICTURE_ENDINGS))}) beside it or in JPEGImages/")


def _label_map(path: Path) -> list[str]:
    """The class names of a labelmap.txt (`name:colour:parts:actions`); none if there is no such file."""
    if not path.is_file():
        return []
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    names = [line.split(":")[0].strip() for line in lines if line and not line.startswith("#")]
    return [name for name in names if name != "background"]


def _object(element: Element) -> SourceObject:
    name = element.find("name").text.strip()
    if not name:
        raise SourceError(f"{element.find('name').place}: <name> is empty")
    box = element.find("bndbox")
    xmin, ymin, xmax, ymax = (box.number(tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if xmax < xmin or ymax < ymin:
        raise SourceError(f"{box.place}: <bndbox> ends before it begins: {xmin:g}, {ymin:g} to {xmax:g}, {ymax:g}")
    flags = {tag: int(element.number(tag)) for tag in _FLAGS if element.find_all(tag)}
    poses = element.find_all("pose")
    attributes = {**flags, **({"pose": poses[0].text.strip()} if poses and poses[0].text.strip() else {})}
    return SourceObject(name, (xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1), attributes=attributes)
