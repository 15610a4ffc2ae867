"""What reads the data of others: annotations, pictures, and the formats that `sim-hf convert` takes."""

from __future__ import annotations

import contextlib
import io

from PIL import Image
from workplace import FOLDER, written

from boxes import boxes_inside, parse_boxes
from coco_faults import ALL_FAULTS, encode, sound_document
from sim_hf.conversion import VocSource, YoloSource
from sim_hf.conversion.source import SourceError
from sim_hf.data import ImageError, load_coco, read_image, read_image_size, validate_coco
from sim_hf.data.annotation_file import AnnotationError
from uploads import UploadError, read_upload

for number in (1, 2):
    Image.new("RGB", (100, 80)).save(FOLDER / f"{number}.png")


def annotations(data: bytes) -> None:
    """The check never raises, and the loader, which opens no pictures, takes what the check of the file alone takes."""
    path = written(data, "annotations.json")
    for with_masks in (False, True):
        full = validate_coco(path, FOLDER, with_masks=with_masks)
        str(full), full.to_json()
        report = validate_coco(path, FOLDER, with_masks=with_masks, images="none")
        assert report.exit_code <= full.exit_code <= 2
        try:
            rows = load_coco(FOLDER, path, with_masks=with_masks, cache_dir=FOLDER / "cache")
        except AnnotationError as error:
            assert report.exit_code != 0, f"the check takes it, the loader does not: {error}"
            assert "\n" not in str(error)
        else:
            assert report.exit_code == 0, f"the loader takes it, the check does not: {report}"
            assert len(rows) == report.num_images


def images(data: bytes) -> None:
    for read in (read_image, read_image_size):
        with contextlib.suppress(ImageError):
            read(data)


def upload(data: bytes) -> None:
    path = written(data, "upload.png")
    with contextlib.suppress(UploadError):
        read_upload(path)


def boxes(data: bytes) -> None:
    with contextlib.suppress(UploadError):
        boxes_inside(parse_boxes(data.decode("utf-8", "replace")), (480, 640))


def voc(data: bytes) -> None:
    """The XML of a picture."""
    written(_PNG, "voc", "1.png")
    written(data, "voc", "1.xml")
    with contextlib.suppress(SourceError, ImageError):
        _read_all(VocSource(FOLDER / "voc"))


def yolo(data: bytes) -> None:
    """The rows of a picture, and the file that describes the data set."""
    written(_PNG, "yolo", "images", "train", "1.png")
    for description, rows in ((_YOLO_DESCRIPTION, data), (data, _YOLO_ROWS)):
        written(description, "yolo", "data.yaml")
        written(rows, "yolo", "labels", "train", "1.txt")
        with contextlib.suppress(SourceError, ImageError, OSError):  # a path that is too long
            _read_all(YoloSource(FOLDER / "yolo"))


def _read_all(source: VocSource | YoloSource) -> None:
    for split, entries in source.splits.items():
        for entry in entries:
            image = source.read(split, entry)
            assert all(len(found.box) == 4 and found.class_name for found in image.objects)
    assert source.categories() is not None


def _picture(kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert(mode).save(stream, kind)
    return stream.getvalue()


_PNG = _picture("PNG")
_YOLO_DESCRIPTION = b"path: .\ntrain: images/train\nnc: 3\nnames:\n  0: a\n  1: b\n  2: c\n"
_YOLO_ROWS = b"2 0.5 0.5 0.5 0.5\n0 0.25 0.5 0.5 1.0\n1 0.1 0.2 0.9 0.2 0.5 0.8\n"
_VOC = b"""<annotation><size><width>24</width><height>16</height><depth>3</depth></size>
<object><name>cow</name><difficult>1</difficult><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>
<ymax>2</ymax></bndbox></part><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>12</ymax></bndbox></object></annotation>"""
PICTURES = [
    *(_picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")),
    _picture("PNG", "P"),
    _picture("PNG", "LA"),
]
SEEDS: dict[str, list[bytes]] = {
    "annotations": [encode(sound_document()), *(fault.content for fault in ALL_FAULTS if len(fault.content) < 10_000)],
    "images": PICTURES,
    "upload": PICTURES,
    "boxes": [b"1 2 30 40", b"1,2,30,40\n5;6;70;80", b"[[1, 2, 30, 40]]", encode(sound_document())],
    "voc": [_VOC],
    "yolo": [_YOLO_ROWS, _YOLO_DESCRIPTION, b"train: images/train\nkpt_shape: [4, 3]\nnames: [a, b, c]\n"],
}
TARGETS = {function.__name__: function for function in (annotations, images, upload, boxes, voc, yolo)}
