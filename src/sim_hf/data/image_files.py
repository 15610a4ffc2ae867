"""The image files that an annotation file names: whether the names stay inside the image folder, and what the files hold.

A name is content that somebody else wrote: it must be a plain relative path, and no link may lead it out of the folder.
Nothing outside the folder is opened or even looked at.
"""

from __future__ import annotations

import os
import posixpath
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sim_hf.data.images import ALLOWED_FORMATS, DEFAULT_MAX_PIXELS, ImageError, read_image

_MAX_PART_BYTES = 255
_MAX_PATH_BYTES = 1024
_EXIF_ORIENTATION = 0x0112
_ORIENTATIONS_ON_THEIR_SIDE = (5, 6, 7, 8)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]{0,199}")


@dataclass(frozen=True)
class ImageFault:
    """`row`: which image; `code`: which entry of the list of faults."""

    row: int
    code: str
    detail: str


def path_fault(name: str) -> str | None:
    """Why `name` is no plain relative path, None when it is one."""
    if _PLAIN_NAME.fullmatch(name) and ".." not in name:
        return None
    if not name.strip():
        return "is empty"
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid Unicode"
    checks = (
        (any(ord(letter) < 32 for letter in name), "has control characters"),
        ("\\" in name, "has a backslash"),
        ("://" in name or "::" in name, "is an address, not a path"),
        (name.startswith(("/", "~")) or name[1:2] == ":", "is an absolute path"),
        (".." in name.split("/"), "leaves the image folder"),
        (name.endswith("/"), "is a folder"),
        (posixpath.normpath(name) == ".", "is a folder"),
        (len(encoded) > _MAX_PATH_BYTES, "is too long"),
        (any(len(part) > _MAX_PART_BYTES for part in encoded.split(b"/")), "is too long"),
    )
    return next((reason for failed, reason in checks if failed), None)


@dataclass
class ImageFolder:
    """The files below `root`. Each folder is listed once, however many names lie in it."""

    root: Path
    _listings: dict[str, dict[str, os.DirEntry[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = Path(os.path.realpath(self.root))
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such image folder")

    def path(self, name: str) -> str:
        """The absolute path of a checked name."""
        return os.path.join(self.root, posixpath.normpath(name))

    def fault(self, name: str) -> tuple[str, str] | None:
        """(code, detail) when `name` is not a file inside the folder."""
        reason = path_fault(name)
        if reason is not None:
            return "image-path", reason
        folder, base = posixpath.split(posixpath.normpath(name))
        entry = self._listing(folder).get(base)
        if entry is not None and entry.is_file(follow_symlinks=False):
            return None
        # A link, or a name that only the file system can tell (upper and lower case, composed letters): ask it.
        target = os.path.realpath(self.path(name))
        if not self._inside(target):
            return "image-path", "is a link that leaves the image folder"
        if not os.path.lexists(target):
            return "image-missing", "no such file"
        return None if os.path.isfile(target) else ("image-path", "is not a regular file")

    def _listing(self, folder: str) -> dict[str, os.DirEntry[str]]:
        if folder not in self._listings:
            place = os.path.realpath(os.path.join(self.root, folder))
            entries: dict[str, os.DirEntry[str]] = {}
            if self._inside(place) and os.path.isdir(place):
                with os.scandir(place) as scan:
                    entries = {entry.name: entry for entry in scan}
            self._listings[folder] = entries
        return self._listings[folder]

    def _inside(self, path: str) -> bool:
        return Path(path).is_relative_to(self.root)


def find_faulty_names(names: list[str], rows: Iterable[int], folder: ImageFolder | None) -> list[ImageFault]:
    """Names (at `rows`) that are no paths inside the folder, or, with a folder, no files."""
    faults = []
    for row in rows:
        if folder is None:
            reason = path_fault(names[row])
            fault = None if reason is None else ("image-path", reason)
        else:
            fault = folder.fault(names[row])
        if fault is not None:
            faults.append(ImageFault(row, *fault))
    return faults


def inspect_images(
    paths: dict[int, str],
    sizes: dict[int, tuple[int, int]],
    *,
    decode: bool,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Iterator[ImageFault | None]:
    """One result per file, in order: its fault or None. `paths` and `sizes` (width, height) are keyed by image row."""

    def inspect(row: int) -> ImageFault | None:
        fault = inspect_image(paths[row], sizes[row], decode=decode, max_pixels=max_pixels)
        return None if fault is None else ImageFault(row, *fault)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as executor, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of broken metadata; the pixels are what counts
        yield from executor.map(inspect, paths)


def inspect_image(
    path: str, size: tuple[int, int], *, decode: bool, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[str, str] | None:
    """(code, detail) of what is wrong with the file: undecodable, too many pixels, another size than (width, height)."""
    try:
        with Image.open(path, formats=_readable_formats()) as image:
            stored = image.size
            # Pillow reads EXIF of a PNG by decoding it: before that, the header has to pass the limit.
            if stored[0] * stored[1] > max_pixels:
                return "image-bomb", f"{stored[0]} x {stored[1]} pixels, the limit is {max_pixels}"
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        if decode:
            read_image(path, max_pixels=max_pixels)
    except ImageError as error:
        return "image-unreadable", str(error).removeprefix(f"{path}: ")
    except Image.DecompressionBombError as error:
        return "image-bomb", str(error)
    except Exception as error:  # decoders of hostile files raise anything, and one file must not stop the list
        return "image-unreadable", _reason(error)
    upright = stored[::-1] if orientation in _ORIENTATIONS_ON_THEIR_SIDE else stored
    if upright == size:
        return None if orientation in (None, 1) else ("image-exif-turned", f"orientation {orientation}")
    said = f"the file is {upright[0]} x {upright[1]}, the annotation file says {size[0]} x {size[1]}"
    if stored == size:
        return "image-exif-swapped", f"EXIF orientation {orientation}: upright {said}"
    return "image-size-mismatch", said


def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in ALLOWED_FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a known format"
    return f"{type(error).__name__}: {error}"
