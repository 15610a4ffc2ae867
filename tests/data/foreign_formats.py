"""Small data sets in the formats that other tools write, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["zebra", "ant", "cow"]  # not in the order of the alphabet: an order that is lost shows


def picture(path: Path, width: int = 40, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 60)).save(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_yolo(folder: Path, *, yaml: str | None = None) -> Path:
    """images/{train,val} and labels/{train,val}: two boxes, a polygon, an empty text file, none; one image to measure on."""
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(NAMES))
    write_text(folder / "data.yaml", yaml or f"path: .\ntrain: images/train\nval: images/val\nnc: 3\nnames:\n{names}\n")
    for name in ("a.png", "b.png", "deep/c.png", "d.png"):
        picture(folder / "images" / "train" / name)
    picture(folder / "images" / "val" / "e.png", 32, 32)
    write_text(folder / "labels" / "train" / "a.txt", "2 0.5 0.5 0.5 0.5\n0 0.25 0.5 0.5 1.0\n")
    write_text(folder / "labels" / "train" / "b.txt", "1 0.1 0.2 0.9 0.2 0.5 0.8\n\n")
    write_text(folder / "labels" / "train" / "deep" / "c.txt", "")
    write_text(folder / "labels" / "val" / "e.txt", "1 0.5 0.5 0.25 0.25")
    return folder


def voc_xml(objects: list[tuple[str, tuple[float, float, float, float], str]], width: int = 40, height: int = 20) -> str:
    """objects: class, (xmin, ymin, xmax, ymax), more XML of the object."""
    parts = [
        f"<object>\n<name>{name}</name>{more}\n<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>"
        f"<ymax>2</ymax></bndbox></part>\n<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox>\n</object>"
        for name, box, more in objects
    ]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return "\n".join(["<annotation>", size, *parts, "</annotation>"])


def write_palette(path: Path, values: np.ndarray) -> Path:
    """A palette PNG, as the devkit's masks are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putpalette([channel for number in range(256) for channel in (number, 255 - number, 7 * number % 256)])
    image.putdata(values.astype(np.uint8).ravel().tolist())
    image.save(path)
    return path


def write_devkit(folder: Path) -> Path:
    """A tree as VOCdevkit/VOC2012: five images, two of them with instance masks to measure on (m1, m2)."""
    truncated = "<difficult>1</difficult><truncated>1</truncated><pose>Left</pose>"
    annotations = {
        "t1": [("dog", (1, 1, 40, 20), truncated), ("cat", (11, 6, 20, 15), "<difficult>0</difficult>")],
        "t2": [],
        "t3": [("person", (2, 3, 4, 5), "")],
        "m1": [("dog", (5, 3, 14, 12), ""), ("person", (21, 3, 30, 12), "")],
        "m2": [("cat", (1, 1, 10, 10), "")],
    }
    for name, objects in annotations.items():
        picture(folder / "JPEGImages" / f"{name}.jpg")
        write_text(folder / "Annotations" / f"{name}.xml", voc_xml(objects))
    instances, classes = np.zeros((20, 40)), np.zeros((20, 40))
    for value, class_value, left in ((1, 12, 4), (2, 15, 20)):  # dog and person
        instances[2:12, left : left + 10] = classes[2:12, left : left + 10] = 255
        instances[3:11, left + 1 : left + 9], classes[3:11, left + 1 : left + 9] = value, class_value
    write_palette(folder / "SegmentationObject" / "m1.png", instances)
    write_palette(folder / "SegmentationClass" / "m1.png", classes)
    one, cat = np.zeros((20, 40)), np.zeros((20, 40))
    one[:10, :10], cat[:10, :10] = 1, 8
    write_palette(folder / "SegmentationObject" / "m2.png", one)
    write_palette(folder / "SegmentationClass" / "m2.png", cat)
    write_palette(folder / "SegmentationObject" / "t1.png", np.ones((20, 40)))
    for name, images in {
        "Main/train": ["t1", "t2"],
        "Main/val": ["t3", "m2"],
        "Main/trainval": ["t1", "t2", "t3", "m2"],
        "Segmentation/train": ["t1"],
        "Segmentation/val": ["m1", "m2"],
    }.items():
        write_text(folder / "ImageSets" / f"{name}.txt", "\n".join(images) + "\n")
    return folder
