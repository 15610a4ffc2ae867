"""Rows in the columns of `load_coco` as a conversion source: what the sources of COCO files and of the Hub share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath

import orjson
from datasets import Dataset, Image
from PIL import Image as PillowImage

from sim_hf.conversion.source import SourceImage, SourceObject
from sim_hf.data.category_ids import category_feature, category_ids
from sim_hf.data.image_files import path_fault
from sim_hf.data.masks import segmentation_rle


class RowsSource(ABC):
    """parts: "train" and, where there is one, "val". Masks are taken for images that are measured on, also for those that are
    drawn from the training part. Ids and order of the classes are those of the training part."""

    kind: str

    def __init__(self, parts: Sequence[str]) -> None:
        self.notes: Counter[str] = Counter()
        self.undecoded: dict[tuple[str, bool], Dataset] = {}
        rows = {part: self._rows(part, measured=part == "val") for part in parts}
        self.names = category_feature(rows["train"]).names
        self.ids = category_ids(rows["train"])
        self.names_of = {part: category_feature(dataset).names for part, dataset in rows.items()}
        self.splits: Mapping[str, Sequence[tuple[str, int]]] = {
            part: [(part, index) for index in range(len(dataset))] for part, dataset in rows.items()
        }

    @abstractmethod
    def load(self, part: str, *, with_masks: bool) -> Dataset:
        """The rows of a part; masks may be there without having been asked for."""

    def categories(self) -> dict[int, str]:
        return dict(zip(self.ids, self.names, strict=True))

    def _rows(self, part: str, *, measured: bool) -> Dataset:
        if (part, measured) not in self.undecoded:
            self.undecoded[part, measured] = self.load(part, with_masks=measured).cast_column("image", Image(decode=False))
        return self.undecoded[part, measured]

    def read(self, split: str, entry: tuple[str, int]) -> SourceImage:
        """entry: a part and the index of a row."""
        part, index = entry
        row = self._rows(part, measured=split == "val")[index]
        width, height = int(row["width"]), int(row["height"])
        content, path = row["image"]["bytes"], row["image"]["path"]
        if content is None:
            content = Path(path)
        objects = row["objects"]
        without = [""] * len(objects["bbox"])
        masks = objects.get("segmentation", without) if split == "val" else without
        names = self.names_of[part]
        found = [
            SourceObject(
                names[label],
                (box[0], box[1], box[2], box[3]),
                segmentation_rle(orjson.loads(mask), height, width) if mask else None,
                crowd=crowd,
            )
            for box, label, crowd, mask in zip(objects["bbox"], objects["category"], objects["iscrowd"], masks, strict=True)
        ]
        return SourceImage(self.name_of(part, path, row["image_id"], content), content, width, height, found)

    def name_of(self, part: str, path: str | None, image_id: int, content: Path | bytes) -> str:
        """The name that the data set gives the file, else one made of the image's id."""
        name = PurePosixPath(path).name if path else ""
        if name and path_fault(name) is None and "." in name:
            return name
        with PillowImage.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
            ending = {"JPEG": "jpg", "TIFF": "tif"}.get(image.format or "", (image.format or "png").lower())
        return f"{image_id:012d}.{ending}"
