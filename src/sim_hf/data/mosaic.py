"""Mosaics: four images on one canvas, for more and smaller objects per sample (YOLOv4, Bochkovskiy et al. 2020, Sec. 3.3).

Tiles do not overlap, so what is known of an object alone is still right when its image lies beside three others: a mosaic of
boxes is box supervision. Shape letters: n objects, h w rows and columns of a tile, s side of the canvas.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sim_hf.data.augmentation import Sample, TrainTransform, read_sample
from sim_hf.data.sampler import SeededDataset, sample_seed

_SPLIT_RANGE = (0.35, 0.65)  # where the canvas is divided, of its side
_SCALE_RANGE = (0.8, 1.25)  # of a tile, relative to the scale between showing all of its image and filling all of its quadrant
_IMAGENET_MEAN = (124, 116, 104)


class MosaicDataset(SeededDataset):
    """A `SeededDataset` of which a sample is, with `probability`, a mosaic of its image and of three others.

    The three others are drawn from the whole data set by the sample's own seed, so a sample still is a function of (seed,
    epoch, index) alone; an epoch still shows every image, and samples that are no mosaics are those of a `SeededDataset`.
    A mosaic carries `image_id` and `orig_size` of its index's image and is always `transform.size` pixels wide and high.

    background: RGB of 0..255 where a tile does not fill its quadrant; the mean colour of the normalisation makes it zero to
    the network, as the padding is.
    """

    def __init__(
        self,
        dataset: Any,
        transform: TrainTransform,
        seed: int = 0,
        *,
        probability: float,
        background: tuple[int, int, int] = _IMAGENET_MEAN,
    ) -> None:
        super().__init__(dataset, transform, seed)
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of a mosaic must be in 0..1, got {probability}")
        if transform.size < 2:
            raise ValueError(f"a mosaic needs a canvas of at least 2 pixels, got {transform.size}")
        self.tile_transform = transform
        self.probability = probability
        self.background = background

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        # Not the transform's own generator, whose first number is the scale: only large scales would be left without mosaic.
        generator = torch.Generator().manual_seed(sample_seed(seed, 0, 0))
        if float(torch.rand((), generator=generator)) >= self.probability:
            return super().sample(index, seed)
        return self._mosaic(index, generator).as_dict()

    def _mosaic(self, index: int, generator: torch.Generator) -> Sample:
        indices = torch.randint(len(self), (4,), generator=generator).tolist()
        own = int(torch.randint(4, (), generator=generator))
        indices[own] = index
        quadrants = _quadrants(self.tile_transform.size, generator)
        tiles = [self._tile(i, q, generator) for i, q in zip(indices, quadrants, strict=True)]
        corners = [_place(tile, q, generator) for tile, q in zip(tiles, quadrants, strict=True)]
        joined = join_tiles(tiles, corners, self.tile_transform.size, self.background)
        return replace(joined, image_id=tiles[own].image_id, orig_size=tiles[own].orig_size)

    def _tile(self, index: int, quadrant: tuple[int, int, int, int], generator: torch.Generator) -> Sample:
        """The image at about the size of its quadrant. Where the two differ in shape the scale is the geometric mean of what
        shows the whole image and what fills the whole quadrant, which loses as much of the one as of the other."""
        transform = self.tile_transform
        sample = read_sample(self.dataset[index], with_masks=transform.with_masks, max_pixels=transform.max_pixels)
        _, _, height, width = quadrant
        image_height, image_width = sample.image_3hw.shape[-2:]
        low, high = _SCALE_RANGE
        jitter = low + (high - low) * float(torch.rand((), generator=generator))
        ratio = jitter * (height / image_height * width / image_width) ** 0.5
        return transform.at_scale(sample, ratio, (height, width), generator)


def join_tiles(tiles: list[Sample], corners: list[tuple[int, int]], size: int, background: tuple[int, int, int]) -> Sample:
    """Samples at their (top, left) on one canvas of `size` x `size`; image id and original size are those of the first."""
    image_3ss = torch.tensor(background, dtype=torch.uint8)[:, None, None].repeat(1, size, size)
    boxes: list[Tensor] = []
    masks: list[Tensor] = []
    for tile, (top, left) in zip(tiles, corners, strict=True):
        height, width = tile.image_3hw.shape[-2:]
        image_3ss[:, top : top + height, left : left + width] = tile.image_3hw
        boxes.append(tile.boxes_n4 + torch.tensor([left, top, left, top]))
        if tile.masks_nhw is not None:
            masks_nss = torch.zeros(len(tile.masks_nhw), size, size, dtype=torch.bool)
            masks_nss[:, top : top + height, left : left + width] = tile.masks_nhw
            masks.append(masks_nss)
    return replace(
        tiles[0],
        image_3hw=image_3ss,
        boxes_n4=torch.cat(boxes),
        class_labels_n=torch.cat([tile.class_labels_n for tile in tiles]),
        has_mask_n=torch.cat([tile.has_mask_n for tile in tiles]),
        masks_nhw=torch.cat(masks) if masks else None,
    )


def _quadrants(size: int, generator: torch.Generator) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of the four parts of a canvas around a random point."""
    low, high = _SPLIT_RANGE
    y, x = (size * (low + (high - low) * torch.rand(2, generator=generator))).round().int().clamp(1, size - 1).tolist()
    return [(0, 0, y, x), (0, x, y, size - x), (y, 0, size - y, x), (y, x, size - y, size - x)]


def _place(tile: Sample, quadrant: tuple[int, int, int, int], generator: torch.Generator) -> tuple[int, int]:
    """(top, left) of a tile that is placed at random in its quadrant."""
    top, left, height, width = quadrant
    room = torch.tensor([height, width]) - torch.tensor(tile.image_3hw.shape[-2:])
    down, right = (torch.rand(2, generator=generator) * (room + 1)).long().minimum(room).tolist()
    return top + down, left + right
