"""What a reader of a foreign format hands over: images, and the boxes of their objects in pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sim_hf.data.images import PICTURE_ENDINGS


class SourceError(ValueError):
    """Something in the source that cannot be converted; the message names the file and, where there are lines, the line."""


@dataclass(frozen=True)
class SourceObject:
    """One object. box: x, y, width, height in pixels of the upright image, as the source has it (it may leave the image).

    segmentation: COCO run lengths, only for objects that are measured on. crowd: neither trained on nor counted. attributes:
    what else the format says of it; it is kept beside COCO's own fields.
    """

    class_name: str
    box: tuple[float, float, float, float]
    segmentation: dict[str, Any] | None = None
    crowd: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceImage:
    """An image and its objects. name: relative, below the folder of its split. content: its file, or its encoded bytes."""

    name: str
    content: Path | bytes
    width: int
    height: int
    objects: Sequence[SourceObject] = ()


class DetectionSource(Protocol):
    """A data set in some format.

    splits: "train" and, where there is one, "val" -> what `read` takes, one for each image. notes: what has to be said once all
    is read, with counts. `categories`: id -> class name in their order; only complete when every image was read.
    """

    kind: str
    splits: Mapping[str, Sequence[Any]]
    notes: Counter[str]

    def read(self, split: str, entry: Any) -> SourceImage: ...

    def categories(self) -> Mapping[int, str]: ...


def pictures_below(folder: Path, pattern: str = "**/*") -> list[Path]:
    """All picture files in the folder and its subfolders, in the order of their names; hidden ones are left out."""
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of the folder itself; of one that is not there, none."""
    return pictures_below(folder, "*")


def first_line(error: Exception) -> str:
    """The reason in one line, for messages that name the place themselves."""
    return (str(error).splitlines() or [type(error).__name__])[0]
