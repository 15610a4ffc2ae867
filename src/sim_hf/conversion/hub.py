"""Detection data sets of the Hub (or saved by `datasets`) as a conversion source: what `load_detection_dataset` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, cast

import orjson
from datasets import Dataset, Image
from PIL import Image as PillowImage

from sim_hf.conversion.source import SourceError, SourceImage, SourceObject
from sim_hf.data.category_ids import category_feature, category_ids
from sim_hf.data.hub import load_detection_dataset
from sim_hf.data.image_files import path_fault
from sim_hf.data.masks import segmentation_rle


class HubSource:
    """A data set with `image` and `objects` {bbox, category}. Masks, if it has any, are taken for the validation split only.

    val_split: None for none. options: of `load_detection_dataset`, such as `revision` or `box_format`.
    """

    kind = "a Hub data set"

    def __init__(self, name: str, *, train_split: str = "train", val_split: str | None = "validation", **options: Any) -> None:
        self.notes: Counter[str] = Counter()
        wanted = {"train": train_split, **({"val": val_split} if val_split else {})}
        self.rows = {
            split: cast(Dataset, load_detection_dataset(name, its_name, **options)) for split, its_name in wanted.items()
        }
        first = self.rows["train"]
        self.names = category_feature(first).names
        self.ids = category_ids(first)
        for split, rows in self.rows.items():
            if category_feature(rows).names != self.names:
                raise SourceError(f"{name}: the classes of {wanted[split]} are not those of {train_split}")
        self.has_masks = {split: "segmentation" in rows.features["objects"] for split, rows in self.rows.items()}
        self.undecoded = {split: rows.cast_column("image", Image(decode=False)) for split, rows in self.rows.items()}
        self.splits: Mapping[str, Sequence[int]] = {split: range(len(rows)) for split, rows in self.rows.items()}

    def categories(self) -> dict[int, str]:
        return dict(zip(self.ids, self.names, strict=True))

    def read(self, split: str, entry: int) -> SourceImage:
        row = self.undecoded[split][entry]
        width, height = int(row["width"]), int(row["height"])
        content, path = row["image"]["bytes"], row["image"]["path"]
        if content is None:
            content = Path(path)
        objects = row["objects"]
        masks = objects["segmentation"] if split == "val" and self.has_masks[split] else [""] * len(objects["bbox"])
        found = [
            SourceObject(
                self.names[label],
                (box[0], box[1], box[2], box[3]),
                segmentation_rle(orjson.loads(mask), height, width) if mask else None,
                crowd=crowd,
            )
            for box, label, crowd, mask in zip(objects["bbox"], objects["category"], objects["iscrowd"], masks, strict=True)
        ]
        return SourceImage(_file_name(path, row["image_id"], content), content, width, height, found)


def _file_name(path: str | None, image_id: int, content: Path | bytes) -> str:
    """The name that the data set gives the file, else one made of the image's id."""
    name = PurePosixPath(path).name if path else ""
    if name and path_fault(name) is None and "." in name:
        return name
    with PillowImage.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
        ending = {"JPEG": "jpg", "TIFF": "tif"}.get(image.format or "", (image.format or "png").lower())
    return f"{image_id:012d}.{ending}"
