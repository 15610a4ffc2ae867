"""Corrupted COCO files, by name, each with the verdict that the check must give.

Every file is the sound document of `sound_document` with one thing wrong. `code` is the finding that names it, `verdict` is
    unreadable  not COCO at all, nothing could be checked (exit code 2)
    refused     an error: training must not start (exit code 1)
    repaired    a warning: dropped, clipped, filled or renumbered, and counted (an error under strict)
    noted       a fact worth knowing, nothing changes
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CocoFault:
    name: str
    content: bytes
    code: str
    verdict: str
    count: int = 1
    num_boxes: int = 4  # what is left of the four sound boxes

    def __str__(self) -> str:
        return self.name


def sound_document() -> dict[str, Any]:
    """Two images of 100 x 80 pixels, two categories with gappy ids, four boxes."""
    boxes = [(1, 5, [10, 20, 30, 40]), (1, 9, [50, 10, 20, 30]), (2, 5, [0, 0, 100, 80]), (2, 9, [5.5, 6.5, 7, 8])]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in (1, 2)],
        "categories": [{"id": 9, "name": "kite"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [[1, 1, 9, 1, 9, 9]],
            }
            for number, (image_id, category_id, box) in enumerate(boxes, start=1)
        ],
    }


def encode(document: Any) -> bytes:
    return json.dumps(document).encode()


def _changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    document = copy.deepcopy(sound_document())
    change(document)
    return encode(document)


def _first(**fields: Any) -> bytes:
    """The sound file with fields of its first annotation replaced (or removed, by ...)."""

    def change(document: dict[str, Any]) -> None:
        _replace(document["annotations"][0], fields)

    return _changed(change)


def _image(**fields: Any) -> bytes:
    return _changed(lambda document: _replace(document["images"][0], fields))


def _category(**fields: Any) -> bytes:
    return _changed(lambda document: _replace(document["categories"][0], fields))


def _replace(record: dict[str, Any], fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if value is ...:
            del record[key]
        else:
            record[key] = value


def _text(old: str, new: str, content: bytes | None = None) -> bytes:
    text = (content or encode(sound_document())).decode()
    assert old in text
    return text.replace(old, new, 1).encode()


def _corners(document: dict[str, Any]) -> None:
    boxes = ([60, 30, 90, 70], [40, 20, 95, 79], [55, 10, 99, 40], [10, 45, 60, 75])
    for annotation, box in zip(document["annotations"], boxes, strict=True):
        annotation["bbox"] = box


_SOUND = encode(sound_document())
_BOX = "[10, 20, 30, 40]"

TEXT_FAULTS = [
    CocoFault("empty-file", b"", "unreadable", "unreadable"),
    CocoFault("cut-off", _SOUND[: len(_SOUND) // 2], "unreadable", "unreadable"),
    CocoFault("cut-off-in-segmentation", _SOUND[: _SOUND.index(b"[[1, 1") + 5], "unreadable", "unreadable"),
    CocoFault("html-page", b"<!DOCTYPE html><html>404</html>", "unreadable", "unreadable"),
    CocoFault("binary", bytes(range(256)), "unreadable", "unreadable"),
    CocoFault("utf-16", _SOUND.decode().encode("utf-16"), "unreadable", "unreadable"),
    CocoFault("deep-nesting", b"[" * 100_000 + b"]" * 100_000, "unreadable", "unreadable"),
    CocoFault("deep-nesting-in-box", _text(_BOX, "[" * 5000 + "]" * 5000), "unreadable", "unreadable"),
    CocoFault("5000-digit-integer", _text(_BOX, f"[{'9' * 5000}, 1, 1, 1]"), "unreadable", "unreadable"),
    CocoFault("list-on-top", encode([sound_document()]), "unreadable", "unreadable"),
    CocoFault("null-on-top", b"null", "unreadable", "unreadable"),
    CocoFault("no-images-key", _changed(lambda d: d.pop("images")), "unreadable", "unreadable"),
    CocoFault("no-annotations-key", _changed(lambda d: d.pop("annotations")), "unreadable", "unreadable"),
    CocoFault("no-categories-key", _changed(lambda d: d.pop("categories")), "unreadable", "unreadable"),
    CocoFault("images-is-object", _changed(lambda d: d.update(images={"1": "a.png"})), "unreadable", "unreadable"),
    CocoFault("annotations-is-null", _changed(lambda d: d.update(annotations=None)), "unreadable", "unreadable"),
    CocoFault("byte-order-mark", b"\xef\xbb\xbf" + _SOUND, "byte-order-mark", "repaired"),
    CocoFault("top-level-key-twice", _SOUND[:-1] + b', "annotations": []}', "repeated-key", "refused", num_boxes=0),
    CocoFault("box-key-twice", _text('"bbox": ', '"bbox": [1, 1, 1, 1], "bbox": '), "repeated-key", "refused"),
    CocoFault("nan-literal", _text(_BOX, "[NaN, 20, 30, 40]"), "non-finite-literal", "repaired", num_boxes=3),
    CocoFault("annotation-is-list", _changed(lambda d: d["annotations"].append([1])), "record-type", "refused"),
    CocoFault("image-is-null", _changed(lambda d: d["images"].append(None)), "record-type", "refused"),
]

BOX_FAULTS = [
    CocoFault("nan-box", _text(_BOX, "[NaN, 20, 30, 40]"), "box-not-finite", "repaired", num_boxes=3),
    CocoFault("infinite-box", _text(_BOX, "[10, 20, Infinity, 40]"), "box-not-finite", "repaired", num_boxes=3),
    CocoFault("1e999-box", _text(_BOX, "[10, 20, 1e999, 40]"), "box-not-finite", "repaired", num_boxes=3),
    CocoFault("negative-width", _first(bbox=[10, 20, -30, 40]), "box-negative", "repaired", num_boxes=3),
    CocoFault("zero-height", _first(bbox=[10, 20, 30, 0]), "box-empty", "repaired", num_boxes=3),
    CocoFault("all-zero-box", _first(bbox=[0, 0, 0, 0]), "box-empty", "repaired", num_boxes=3),
    CocoFault("outside-right", _first(bbox=[100, 20, 30, 40]), "box-outside", "repaired", num_boxes=3),
    CocoFault("outside-above", _first(bbox=[10, -50, 30, 40]), "box-outside", "repaired", num_boxes=3),
    CocoFault("partly-outside", _first(bbox=[90, -5, 30, 40]), "box-partly-outside", "repaired"),
    CocoFault("three-numbers", _first(bbox=[10, 20, 30]), "box-malformed", "refused", num_boxes=3),
    CocoFault("five-numbers", _first(bbox=[10, 20, 30, 40, 50]), "box-malformed", "refused", num_boxes=3),
    CocoFault("string-box", _first(bbox="10 20 30 40"), "box-malformed", "refused", num_boxes=3),
    CocoFault("strings-in-box", _first(bbox=["10", "20", "30", "40"]), "box-malformed", "refused", num_boxes=3),
    CocoFault("true-in-box", _first(bbox=[True, 20, 30, 40]), "box-malformed", "refused", num_boxes=3),
    CocoFault("null-box", _first(bbox=None), "box-malformed", "refused", num_boxes=3),
    CocoFault("null-in-box", _first(bbox=[None, 20, 30, 40]), "box-malformed", "refused", num_boxes=3),
    CocoFault("nested-box", _first(bbox=[[10, 20, 30, 40]]), "box-malformed", "refused", num_boxes=3),
    CocoFault("no-box", _first(bbox=...), "box-malformed", "refused", num_boxes=3),
    CocoFault("corners-for-sizes", _changed(_corners), "box-format", "refused", count=4),
    CocoFault("same-box-twice", _changed(lambda d: d["annotations"].append({**d["annotations"][0], "id": 7})),
              "box-duplicate", "repaired", num_boxes=5),
]  # fmt: skip

ID_FAULTS = [
    CocoFault("image-id-twice", _changed(lambda d: d["images"].append({**d["images"][0], "file_name": "3.png"})),
              "image-id-duplicate", "refused"),
    CocoFault("image-id-missing", _image(id=...), "image-id", "refused", num_boxes=2),
    CocoFault("image-id-word", _image(id="first"), "image-id", "refused", num_boxes=2),
    CocoFault("image-id-true", _image(id=True), "image-id", "refused", num_boxes=2),
    CocoFault("image-id-huge", _image(id=2**70), "image-id", "refused", num_boxes=2),
    CocoFault("image-id-text-of-digits", _image(id="1"), "id-converted", "repaired"),
    CocoFault("image-id-negative", _changed(lambda d: d["images"].append({**d["images"][0], "id": -3, "file_name": "3.png"})),
              "image-id-negative", "noted"),
    CocoFault("annotation-id-twice", _first(id=2), "annotation-id-duplicate", "repaired"),
    CocoFault("annotation-id-zero", _first(id=0), "annotation-id-zero", "repaired"),
    CocoFault("annotation-id-negative", _first(id=-1), "annotation-id-negative", "repaired"),
    CocoFault("annotation-id-missing", _first(id=...), "annotation-id", "repaired"),
    CocoFault("annotation-id-word", _first(id="a1"), "annotation-id", "repaired"),
    CocoFault("unknown-image", _first(image_id=77), "unknown-image", "repaired", num_boxes=3),
    CocoFault("image_id-missing", _first(image_id=...), "annotation-image-id", "refused", num_boxes=3),
    CocoFault("unknown-category", _first(category_id=77), "unknown-category", "refused", num_boxes=3),
    CocoFault("category_id-null", _first(category_id=None), "annotation-category-id", "refused", num_boxes=3),
    CocoFault("category_id-float", _first(category_id=5.0), "id-converted", "repaired"),
    CocoFault("category_id-fraction", _first(category_id=5.5), "annotation-category-id", "refused", num_boxes=3),
    CocoFault("category-id-twice", _category(id=5), "category-id-duplicate", "refused", num_boxes=2),
    CocoFault("category-name-twice", _category(name="dog"), "category-name-duplicate", "repaired"),
    CocoFault("category-name-missing", _category(name=...), "category-name", "refused"),
    CocoFault("category-name-number", _category(name=7), "category-name", "refused"),
    CocoFault("category-id-negative", _text('"category_id": 9', '"category_id": -4', _text('"category_id": 9',
              '"category_id": -4', _category(id=-4))), "category-id-negative", "noted"),
    CocoFault("no-categories", _changed(lambda d: d.update(categories=[], annotations=[])),
              "no-categories", "refused", num_boxes=0),
]  # fmt: skip

OTHER_FAULTS = [
    CocoFault("width-missing", _image(width=...), "image-size", "refused", num_boxes=2),
    CocoFault("height-zero", _image(height=0), "image-size", "refused", num_boxes=2),
    CocoFault("width-negative", _image(width=-100), "image-size", "refused", num_boxes=2),
    CocoFault("height-text", _image(height="tall"), "image-size", "refused", num_boxes=2),
    CocoFault("file-name-missing", _image(file_name=...), "image-path", "refused"),
    CocoFault("file-name-number", _image(file_name=1), "image-path", "refused"),
    CocoFault("file-listed-twice", _image(file_name="2.png"), "image-file-duplicate", "repaired"),
    CocoFault("area-missing", _first(area=...), "area-missing", "noted"),
    CocoFault("area-zero", _first(area=0), "area-invalid", "noted"),
    CocoFault("area-text", _first(area="big"), "area-invalid", "noted"),
    CocoFault("iscrowd-missing", _first(iscrowd=...), "iscrowd-missing", "noted"),
    CocoFault("iscrowd-two", _first(iscrowd=2), "iscrowd-invalid", "repaired"),
    CocoFault("crowd", _first(iscrowd=1), "crowd", "noted", num_boxes=3),
    CocoFault("image-without-annotations",
              _changed(lambda d: d["images"].append({"id": 3, "file_name": "3.png", "width": 9, "height": 9})),
              "image-without-annotations", "noted"),
    CocoFault("category-without-annotations", _changed(lambda d: d["categories"].append({"id": 1, "name": "cat"})),
              "category-unused", "noted"),
]  # fmt: skip

ALL_FAULTS = TEXT_FAULTS + BOX_FAULTS + ID_FAULTS + OTHER_FAULTS

# What box training must never even look at: each replaces the text of the first segmentation.
GARBAGE_SEGMENTATIONS = {
    "nan": b"[[NaN, 1e999, -Infinity]]",
    "deep-nesting": b"[" * 200_000 + b"]" * 200_000,
    "5000-digit-integer": b"[[" + b"9" * 5000 + b"]]",
    "brackets-in-strings": b'{"counts": "]}\\"]{[", "size": "}"}',
    "no-json-inside-brackets": b"[[1,,2], wrong, 'x', [[]]]",
    "key-of-its-own": b'{"segmentation": [1, 2], "bbox": null, "id": "no"}',
    "string": b'"polygon"',
    "number": b"12345",
    "null": b"null",
    "empty": b"[]",
    "flat-list": b"[1, 2, 3]",
    "rle-without-size": b'{"counts": [1, 2, 3]}',
}

# file_name -> why it must be refused; nothing outside the image folder may be opened for it.
ESCAPING_NAMES = {
    "../secret.png": "leaves",
    "a/../../secret.png": "leaves",
    "/etc/passwd": "absolute",
    "~/secret.png": "absolute",
    "C:/secret.png": "absolute",
    "file:///etc/passwd": "address",
    "http://localhost/1.png": "address",
    "zip://1.png::archive.zip": "address",
    "a.png::b": "address",
    "1.png\0.jpg": "control",
    "a\\b.png": "backslash",
    "..\\secret.png": "backslash",
    "x" * 300: "too long",
    "a/" * 600 + "1.png": "too long",
    "": "empty",
    " ": "empty",
    ".": "folder",
    "1.png/": "folder",
}
