"""Loading beside `datasets` and transformers: JPEG files of 640x480 to a padded batch at 800 px, on one thread.

Ours: the package's own path of evaluation, which is that of training without its random part: `SeededDataset` (read_pixels),
`EvalTransform`, `DetectionCollator`; it carries the boxes along. The peer: the decoding of `datasets.Image` and
`Mask2FormerImageProcessor`, without boxes. Both give the longest side 800 pixels, bilinear and antialiased.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from PIL import Image, ImageOps
from transformers import Mask2FormerImageProcessor

from measuring import Row, compare, seconds
from sim_hf import SIMImageProcessor
from sim_hf.data import DetectionCollator, EvalTransform, SeededDataset, load_coco, read_image, write_coco, write_scenes
from sim_hf.data.augmentation import resize_pixels
from sim_hf.data.collator import normalized
from sim_hf.data.images import read_pixels

SIZE_DIVISOR = 32
TOLERANCE = 1e-3  # of normalised values; one step of 8 bits is 0.017
JPEG_QUALITY = 92


def loading_rows(
    repeats: int,
    data: Path | None,
    *,
    num_images: int = 32,
    batch_size: int = 8,
    picture_size: tuple[int, int] = (480, 640),
    longest: int = 800,
) -> list[Row]:
    """Two rows, in seconds per image. picture_size: (height, width) of the files."""
    height, width = picture_size
    with tempfile.TemporaryDirectory() as folder, one_thread():
        loading = Loading(Path(folder), data, num_images, batch_size, picture_size, longest)
        row = compare(
            f"loading: {width}x{height} JPEG to batches of {batch_size} at {longest} px, per image",
            "datasets.Image + Mask2FormerImageProcessor, without boxes",
            loading.ours,
            loading.peer,
            equal=loading.is_equal(),
            goal=0.5,
            repeats=repeats,
            note=f"one thread; equal: the first batch's values to {TOLERANCE:g} (same resampling) and its pixel mask",
        )
        bytes_row = compare(
            f"the same, batches of bytes as training has them ({longest} px), per image",
            "datasets.Image + Mask2FormerImageProcessor, without boxes",
            loading.ours_as_bytes,
            loading.peer,
            equal=loading.is_equal_as_bytes(),
            goal=0.25,
            repeats=repeats,
            note="without the normalisation and the planes, which the device makes; equal: then bit for bit the batches above",
        )
        parts = [
            statistics.median(seconds(part) for _ in range(repeats)) / num_images for part in (loading.decode, loading.resize)
        ]
    rows = [row, bytes_row]
    for each in rows:
        each.ours_seconds, each.peer_seconds = each.ours_seconds / num_images, each.peer_seconds / num_images
        each.note += (
            f"; of ours, {parts[0] * 1000:.2f} ms an image are decoding and {parts[1] * 1000:.2f} ms resizing, a library's"
        )
    return rows


class Loading:
    """The same files, loaded both ways."""

    def __init__(
        self,
        folder: Path,
        data: Path | None,
        num_images: int,
        batch_size: int,
        picture_size: tuple[int, int],
        longest: int,
    ) -> None:
        write_files(folder, pictures(data, num_images, picture_size))
        rows = load_coco(folder / "images", folder / "instances.json", cache_dir=folder / "cache")
        processor = SIMImageProcessor()
        self.batch_size = batch_size
        self.samples = SeededDataset(rows, EvalTransform(longest))
        self.collate = DetectionCollator(processor.image_mean, processor.image_std, size_divisor=SIZE_DIVISOR)
        self.collate_bytes = DetectionCollator(
            processor.image_mean, processor.image_std, size_divisor=SIZE_DIVISOR, as_bytes=True
        )
        self.pictures: datasets.Dataset = rows.select_columns(["image"])
        self.size = height, width = tuple(round(side * longest / max(picture_size)) for side in picture_size)
        self.decoded: list[torch.Tensor] = []
        # Its size_divisor would stretch the picture to a multiple of 32; padding to one is what the batch needs.
        self.processor = Mask2FormerImageProcessor(
            size={"shortest_edge": min(height, width), "longest_edge": longest},
            size_divisor=0,
            pad_size={"height": round_up(height), "width": round_up(width)},
        )

    def ours(self) -> None:
        for start in range(0, len(self.samples), self.batch_size):
            self.our_batch(start)

    def ours_as_bytes(self) -> None:
        for start in range(0, len(self.samples), self.batch_size):
            self.our_batch(start, self.collate_bytes)

    def peer(self) -> None:
        for start in range(0, len(self.pictures), self.batch_size):
            self.peer_batch(start)

    def decode(self) -> None:
        self.decoded = [read_pixels(self.samples.dataset[index]["image"]) for index in range(len(self.samples))]

    def resize(self) -> None:
        """What `decode` left, one at a time: the same memory again and again."""
        for pixels in self.decoded:
            resize_pixels(pixels, *self.size)

    def our_batch(self, start: int, collate: DetectionCollator | None = None) -> dict:
        stop = min(start + self.batch_size, len(self.samples))
        return (collate or self.collate)([self.samples[index] for index in range(start, stop)])

    def peer_batch(self, start: int):
        return self.processor(self.pictures[start : start + self.batch_size]["image"], return_tensors="pt")

    def is_equal(self) -> bool:
        ours, theirs = self.our_batch(0), self.peer_batch(0)
        same_shape = ours["pixel_values"].shape == theirs["pixel_values"].shape
        return (
            same_shape
            and torch.equal(ours["pixel_mask"], theirs["pixel_mask"])
            and torch.allclose(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=TOLERANCE)
        )

    def is_equal_as_bytes(self) -> bool:
        ours = self.our_batch(0)
        again = normalized(self.our_batch(0, self.collate_bytes), self.collate.image_mean, self.collate.image_std)
        return self.is_equal() and all(torch.equal(ours[name], again[name]) for name in ("pixel_values", "pixel_mask"))


def pictures(data: Path | None, count: int, size: tuple[int, int]) -> list[Image.Image]:
    """`count` RGB pictures of `size` (height, width), cut and scaled from the photographs of the COCO folder `data`, or from
    generated scenes. A folder with fewer is gone through again."""
    height, width = size
    with tempfile.TemporaryDirectory() as temporary:
        folder = data
        if folder is None:
            folder = write_scenes(Path(temporary) / "scenes", num_train=0, num_val=min(count, 8), size=320, progress=False)
        images = json.loads((folder / "instances_val.json").read_text(encoding="utf-8"))["images"][:count]
        if not images:
            raise ValueError(f"{folder}: instances_val.json names no images")
        found = [read_image(folder / "images" / image["file_name"]) for image in images]
    found = [ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC) for picture in found]
    return [found[index % len(found)] for index in range(count)]


def write_files(folder: Path, images: list[Image.Image]) -> None:
    """images/ and instances.json, with four boxes an image."""
    (folder / "images").mkdir(parents=True)
    document: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for image_id, image in enumerate(images, start=1):
        name = f"{image_id:06d}.jpg"
        image.save(folder / "images" / name, quality=JPEG_QUALITY)
        document["images"].append({"id": image_id, "file_name": name, "width": image.width, "height": image.height})
        half_width, half_height = image.width // 2, image.height // 2
        for x, y in ((0, 0), (half_width, 0), (0, half_height), (half_width, half_height)):
            annotation = {"id": len(document["annotations"]) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            annotation |= {"bbox": [x, y, half_width, half_height], "area": half_width * half_height}
            document["annotations"].append(annotation)
    write_coco(folder / "instances.json", document)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def round_up(length: int) -> int:
    return -(-length // SIZE_DIVISOR) * SIZE_DIVISOR
