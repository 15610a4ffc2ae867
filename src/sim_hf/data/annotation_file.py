"""Reading an annotation file that nobody vouches for, and writing one that is never half there.

Everything that can be wrong with the text itself (not JSON, a byte order mark, NaN, nesting that would exhaust the stack,
integers of thousands of digits, keys given twice) ends in an `AnnotationError` of one line or in a remark on the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sim_hf.data.segmentation_text import SegmentationText, separate_segmentations

MAX_FILE_BYTES = 4 * 1024**3
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# Keys that appear nowhere else in a COCO file, so that counting them in the text shows whether one was given twice.
_COUNTED_KEYS = ("images", "annotations", "categories", "file_name", "image_id", "category_id", "bbox")


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file and the place."""


class UnreadableAnnotationError(AnnotationError):
    """The file is no COCO document at all: nothing in it could be checked."""


@dataclass(frozen=True)
class AnnotationFile:
    """A parsed file: `document` holds the number of its text instead of each segmentation."""

    path: Path
    document: dict[str, list[Any]]
    segmentations: SegmentationText
    has_byte_order_mark: bool = False
    has_non_finite_literals: bool = False
    repeated_keys: list[str] = field(default_factory=list)


def read_annotation_bytes(path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The content of the file; UnreadableAnnotationError when it is missing, a folder or larger than `max_bytes`."""
    try:
        size = os.stat(path).st_size
        if size > max_bytes:
            raise UnreadableAnnotationError(f"{path}: {size} bytes, expected at most {max_bytes}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableAnnotationError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableAnnotationError(f"{path}: cannot be read ({reason})") from error


def content_digest(content: bytes) -> str:
    """What identifies the content of a file, whatever its name and dates are."""
    return hashlib.sha256(content).hexdigest()


def parse_annotations(path: str | os.PathLike[str], content: bytes) -> AnnotationFile:
    """The COCO document in `content` (of the file `path`, for messages), its segmentations unread."""
    has_byte_order_mark = content.startswith(_BYTE_ORDER_MARK)
    text, segmentations = separate_segmentations(content[len(_BYTE_ORDER_MARK) :] if has_byte_order_mark else content)
    document, non_finite = _parse_json(path, text)
    for key, expected in (("images", list), ("annotations", list), ("categories", list)):
        if not isinstance(document, dict):
            raise UnreadableAnnotationError(
                f"{path}: a JSON {_json_type(document)}, expected an object with images, annotations and categories"
            )
        if key not in document:
            raise UnreadableAnnotationError(f'{path}: no "{key}"; it has {_first_keys(document)}')
        if not isinstance(document[key], expected):
            raise UnreadableAnnotationError(f'{path}: "{key}" is a {_json_type(document[key])}, expected a list')
    return AnnotationFile(
        path=Path(path),
        document=document,
        segmentations=segmentations,
        has_byte_order_mark=has_byte_order_mark,
        has_non_finite_literals=non_finite,
        repeated_keys=_repeated_keys(text, document),
    )


def write_coco(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write `document` as JSON so that `path` holds the old or the whole new content, even after a crash.

    Strict JSON: NaN, infinities and keys that are not strings are refused instead of written as null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = _non_finite_place(document)
    if place is not None:
        raise ValueError(f"{path}: not written, {place} is not finite and JSON has no such number")
    content = orjson.dumps(dict(document), option=orjson.OPT_SERIALIZE_NUMPY)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _parse_json(path: str | os.PathLike[str], text: bytes) -> tuple[Any, bool]:
    """The document and whether it needed the lenient parser (NaN, Infinity, 1e999, integers above 64 bits)."""
    if text.startswith(_UTF16_MARKS):
        raise UnreadableAnnotationError(f"{path}: UTF-16 text, expected UTF-8")
    try:
        return orjson.loads(text), False
    except orjson.JSONDecodeError as error:
        reason = error.msg
        # Parsed by a reader without a stack limit of its own, deep nesting is refused there as well: do not try.
        if "depth" in reason or "recursion" in reason.lower():
            raise UnreadableAnnotationError(f"{path}: nested too deep to be COCO ({reason})") from None
    try:
        return json.loads(text.decode("utf-8")), True
    except RecursionError:
        raise UnreadableAnnotationError(f"{path}: nested too deep to be COCO") from None
    except (ValueError, MemoryError):  # of the two messages, the strict parser's names line and column
        excerpt = "empty file" if not text.strip() else f"{reason}"
        raise UnreadableAnnotationError(f"{path}: not JSON ({excerpt})") from None


def _json_type(value: Any) -> str:
    names = {list: "list", dict: "object", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _first_keys(document: dict[str, Any]) -> str:
    keys = [repr(key[:40]) for key in list(document)[:6]]
    return ", ".join(keys) if keys else "no keys"


def _repeated_keys(text: bytes, document: dict[str, Any]) -> list[str]:
    """Keys that one object gives twice. Parsers keep the last and say nothing: half an annotation list can vanish."""
    in_document: Counter[str] = Counter(document.keys())
    for name in ("images", "annotations", "categories"):
        for record in document[name]:
            if isinstance(record, dict):
                in_document.update(record.keys())
    if all(text.count(b'"%s"' % key.encode()) <= in_document[key] for key in _COUNTED_KEYS):
        return []
    repeated: Counter[str] = Counter()

    def count_repeated(pairs: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in pairs}) < len(pairs):
            repeated.update(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)

    json.loads(text.decode("utf-8"), object_pairs_hook=count_repeated)
    return sorted(key[:40] for key in repeated)


def _non_finite_place(value: Any) -> str | None:
    """Where a NaN or an infinity stands ("annotations[3].bbox[0]"), None when there is none."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        place, item = stack.pop()
        if isinstance(item, float | np.floating | np.ndarray) and not np.isfinite(item).all():
            return place
        if isinstance(item, Mapping):
            stack.extend((f"{place}.{key}" if place else str(key), entry) for key, entry in item.items())
        elif isinstance(item, list | tuple):
            stack.extend((f"{place}[{index}]", entry) for index, entry in enumerate(item))
    return None
