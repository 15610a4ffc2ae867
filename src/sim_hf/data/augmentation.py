"""Rows of a data set to training and evaluation samples: resizing, random crops, flips and colours, boxes in step with pixels.

A row is what `load_coco` or a Hub data set in the `objects` convention gives: `image` (anything `read_image` takes),
`image_id`, optionally `width` and `height`, and `objects` with `bbox` (xywh pixels), `category`, optionally `iscrowd`, `id`
and `segmentation`. Shape letters: n objects of the image, t candidate windows, h w rows and columns of the image.

All randomness comes from one generator per sample, so a sample depends on its seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sim_hf.data.images import DEFAULT_MAX_PIXELS, read_pixels
from sim_hf.data.masks import decode_segmentation
from sim_hf.data.zoom import object_window
from sim_hf.structures import mask_boxes

_NUM_WINDOWS = 10  # candidate crops per image, of which the least harmful is taken
_WHOLE = 0.999  # visible fraction from which an object counts as not cut (boxes are rounded to pixels)


class TrainTransform:
    """Large-scale jitter: longest side to `size` times a random scale, a random crop where that is larger than `size`, a
    random flip and random colours. The result is at most `size` x `size`; the collator pads.

    Crops and box supervision: a cropped object of which only the box is known gets the clipped box. That box may be larger
    than what is left of the object (the cut can take the very pixels that touched a side), and the projection loss takes
    boxes as tight. So cuts are avoided rather than corrected: of ten random windows the one that cuts the fewest objects is
    taken, no window is taken that would lose every object, and an object of which less than `min_visible` of the box is left
    is dropped. An object with a mask gets the tight box of what is left of the mask.

    scale_range: of the longest side, relative to `size`. zoom: probability of a view of one object enlarged instead (`zoom.py`).
    flip: probability of mirroring. brightness, contrast, saturation: largest relative change; hue: largest turn of the colour
    circle (1 is a whole turn). min_box_size: pixels of the result. with_masks: also give `masks`, decoded from
    `objects.segmentation`.
    """

    def __init__(
        self,
        size: int,
        *,
        scale_range: tuple[float, float] = (0.5, 2.0),
        zoom: float = 0.0,
        flip: float = 0.5,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.03,
        min_visible: float = 0.3,
        min_box_size: float = 2.0,
        with_masks: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {size}")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range must be (low, high) with 0 < low <= high, got {scale_range}")
        for name, probability in (("zoom", zoom), ("flip", flip)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} must be a probability, got {probability}")
        self.size = size
        self.scale_range = scale_range
        self.zoom = zoom
        self.flip = flip
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.min_visible = min_visible
        self.min_box_size = min_box_size
        self.with_masks = with_masks
        self.max_pixels = max_pixels

    def __call__(self, example: Mapping[str, Any], *, seed: int | None = None) -> dict[str, Any]:
        """A row -> `image` uint8 (3, h, w), `boxes` (n, 4) xyxy, `class_labels`, `has_mask`, `image_id`, `orig_size`
        (and `masks`). `seed` decides everything random; without one it is drawn from torch's global generator."""
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        generator = torch.Generator().manual_seed(seed)
        sample = read_sample(example, with_masks=self.with_masks, max_pixels=self.max_pixels)
        jitter = _uniform(generator, *self.scale_range)
        if self.zoom and _uniform(generator, 0, 1) < self.zoom:
            window = object_window(sample.boxes_n4, sample.orig_size, self.size, generator)
            if window is not None:
                sample, jitter = self._cropped(sample, *window), 1.0
        ratio = self.size * jitter / max(sample.image_3hw.shape[-2:])
        return self.at_scale(sample, ratio, (self.size, self.size), generator).as_dict()

    def at_scale(self, sample: Sample, ratio: float, limit: tuple[int, int], generator: torch.Generator) -> Sample:
        """The image scaled by `ratio`, cut to at most `limit` (height, width), flipped and recoloured at random."""
        sample = self._scale_and_crop(sample, ratio, limit, generator)
        if _uniform(generator, 0, 1) < self.flip:
            sample = _mirrored(sample)
        sample = sample.select(_box_sides(sample.boxes_n4).amin(-1) >= self.min_box_size)
        return replace(sample, image_3hw=self._recoloured(sample.image_3hw, generator))

    def _scale_and_crop(self, sample: Sample, ratio: float, limit: tuple[int, int], generator: torch.Generator) -> Sample:
        height, width = sample.image_3hw.shape[-2:]
        # The window is cut before resizing: the same crop for a fraction of the work.
        window_height = min(height, max(1, round(limit[0] / ratio)))
        window_width = min(width, max(1, round(limit[1] / ratio)))
        window = self._choose_window(sample.boxes_n4, (height, width), (window_height, window_width), generator)
        if window is None:
            ratio = min(ratio, limit[0] / height, limit[1] / width)
            window, window_height, window_width = (0, 0), height, width
        sample = self._cropped(sample, *window, window_height, window_width)
        new_height = min(limit[0], max(1, round(window_height * ratio)))
        new_width = min(limit[1], max(1, round(window_width * ratio)))
        return _resized(sample, new_height, new_width)

    def _choose_window(
        self, boxes_n4: Tensor, image_size: tuple[int, int], window_size: tuple[int, int], generator: torch.Generator
    ) -> tuple[int, int] | None:
        """(top, left) of the random window that cuts the fewest objects, or None when none of them keeps any object."""
        room = torch.tensor(image_size) - torch.tensor(window_size)
        corners_t2 = (torch.rand(_NUM_WINDOWS, 2, generator=generator) * (room + 1)).long().minimum(room)
        if len(boxes_n4) == 0:
            return int(corners_t2[0, 0]), int(corners_t2[0, 1])
        low_t12 = corners_t2.flip(-1)[:, None].float()
        high_t12 = low_t12 + torch.tensor([window_size[1], window_size[0]])
        inside_tn2 = torch.minimum(boxes_n4[:, 2:], high_t12) - torch.maximum(boxes_n4[:, :2], low_t12)
        visible_tn = inside_tn2.clamp(min=0).prod(-1) / _box_sides(boxes_n4).prod(-1)
        num_kept_t = (visible_tn >= self.min_visible).sum(-1)
        num_cut_t = ((visible_tn > 0) & (visible_tn < _WHOLE)).sum(-1)
        num_cut_t = num_cut_t.masked_fill(num_kept_t == 0, len(boxes_n4) + 1)
        best = int(num_cut_t.argmin())  # the first of equals, hence still a random one
        return None if num_kept_t[best] == 0 else (int(corners_t2[best, 0]), int(corners_t2[best, 1]))

    def _cropped(self, sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
        if (height, width) == tuple(sample.image_3hw.shape[-2:]):
            return sample
        boxes_n4 = _clip(sample.boxes_n4 - torch.tensor([left, top, left, top]), height, width)
        visible_n = _box_sides(boxes_n4).prod(-1) / _box_sides(sample.boxes_n4).prod(-1)
        kept_n = visible_n >= self.min_visible
        masks_nhw = sample.masks_nhw
        if masks_nhw is not None:
            masks_nhw = masks_nhw[:, top : top + height, left : left + width]
            emptied_n = sample.has_mask_n & ~masks_nhw.any(-1).any(-1)
            kept_n &= ~emptied_n
            tightened_n = sample.has_mask_n & (visible_n < _WHOLE)
            boxes_n4 = torch.where(tightened_n[:, None], mask_boxes(masks_nhw), boxes_n4)
        image_3hw = sample.image_3hw[:, top : top + height, left : left + width]
        return replace(sample, image_3hw=image_3hw, boxes_n4=boxes_n4, masks_nhw=masks_nhw).select(kept_n)

    def _recoloured(self, image_3hw: Tensor, generator: torch.Generator) -> Tensor:
        brightness = 1 + _uniform(generator, -self.brightness, self.brightness)
        contrast = 1 + _uniform(generator, -self.contrast, self.contrast)
        saturation = 1 + _uniform(generator, -self.saturation, self.saturation)
        hue = _uniform(generator, -self.hue, self.hue)
        if (brightness, contrast, saturation, hue) == (1, 1, 1, 0):
            return image_3hw
        return jitter_colors(image_3hw, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


class EvalTransform:
    """Longest side to `size`, aspect ratio kept, nothing random. With `shortest`: the shorter side to `shortest` unless the
    longer one would exceed `size`."""

    def __init__(
        self,
        size: int,
        shortest: int | None = None,
        *,
        with_masks: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        if size < 1 or (shortest is not None and not 1 <= shortest <= size):
            raise ValueError(f"expected 1 <= shortest <= size, got size={size}, shortest={shortest}")
        self.size = size
        self.shortest = shortest
        self.with_masks = with_masks
        self.max_pixels = max_pixels

    def __call__(self, example: Mapping[str, Any], *, seed: int | None = None) -> dict[str, Any]:
        """A row -> the same keys as `TrainTransform`. `seed` is accepted so that the two are interchangeable."""
        sample = read_sample(example, with_masks=self.with_masks, max_pixels=self.max_pixels)
        height, width = sample.image_3hw.shape[-2:]
        ratio = self.size / max(height, width)
        if self.shortest is not None:
            ratio = min(ratio, self.shortest / min(height, width))
        return _resized(sample, max(1, round(height * ratio)), max(1, round(width * ratio))).as_dict()


@dataclass
class Sample:
    """An image and its objects on the way through a transform; boxes are xyxy pixels of the image as it is now."""

    image_3hw: Tensor
    boxes_n4: Tensor
    class_labels_n: Tensor
    has_mask_n: Tensor
    masks_nhw: Tensor | None
    image_id: int
    orig_size: tuple[int, int]

    def select(self, kept_n: Tensor) -> Sample:
        if bool(kept_n.all()):
            return self
        return replace(
            self,
            boxes_n4=self.boxes_n4[kept_n],
            class_labels_n=self.class_labels_n[kept_n],
            has_mask_n=self.has_mask_n[kept_n],
            masks_nhw=None if self.masks_nhw is None else self.masks_nhw[kept_n],
        )

    def as_dict(self) -> dict[str, Any]:
        sample = {
            "image": self.image_3hw,
            "boxes": self.boxes_n4,
            "class_labels": self.class_labels_n,
            "has_mask": self.has_mask_n,
            "image_id": self.image_id,
            "orig_size": self.orig_size,
        }
        return sample if self.masks_nhw is None else sample | {"masks": self.masks_nhw}


def read_sample(example: Mapping[str, Any], *, with_masks: bool = False, max_pixels: int = DEFAULT_MAX_PIXELS) -> Sample:
    """A data set row -> its decoded picture and clipped xyxy boxes. Crowd annotations and boxes without area are left out."""
    image_3hw = read_pixels(example["image"], max_pixels=max_pixels)
    height, width = image_3hw.shape[-2:]
    image_id = int(example["image_id"])
    _check_size(example, height, width, image_id)
    objects = example["objects"]
    boxes_n4 = torch.as_tensor(np.asarray(objects["bbox"], dtype=np.float32).reshape(-1, 4).copy())
    if not bool(torch.isfinite(boxes_n4).all()):
        raise ValueError(f"image {image_id} has boxes that are not finite: {boxes_n4.tolist()}")
    boxes_n4 = _clip(torch.cat([boxes_n4[:, :2], boxes_n4[:, :2] + boxes_n4[:, 2:]], -1), height, width)
    crowd = objects.get("iscrowd")
    crowd_n = torch.as_tensor(np.asarray([False] * len(boxes_n4) if crowd is None else crowd, dtype=bool))
    rows = torch.nonzero(~crowd_n & (_box_sides(boxes_n4) > 0).all(-1))[:, 0]
    has_mask_n, masks_nhw = torch.zeros(len(rows), dtype=torch.bool), None
    if with_masks:
        has_mask_n, masks_nhw = _decode_masks(objects, rows.tolist(), height, width)
    return Sample(
        image_3hw=image_3hw,
        boxes_n4=boxes_n4[rows],
        class_labels_n=torch.as_tensor(np.asarray(objects["category"], dtype=np.int64).copy())[rows],
        has_mask_n=has_mask_n,
        masks_nhw=masks_nhw,
        image_id=image_id,
        orig_size=(height, width),
    )


def resize_pixels(pixels_chw: Tensor, height: int, width: int) -> Tensor:
    """uint8 planes (c, h, w) -> (c, height, width), bilinear and antialiased, as torchvision's `resize`. In memory the result
    lies pixel by pixel: twice as fast, and who needs planes can make them on the way to where they go."""
    if len(pixels_chw) == 0:
        return pixels_chw.new_zeros(0, height, width)
    batch = pixels_chw.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # strides that torch recognises as channels-last
    return interpolate(batch, (height, width), mode="bilinear", align_corners=False, antialias=True)[0]


def jitter_colors(image_3hw: Tensor, *, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Brightness, contrast and saturation factors (1 changes nothing) and a hue turn (in turns), on uint8 RGB.

    All four are linear in the colour, so they are one 3x3 matrix and one offset, and a single pass over the pixels. Contrast
    is about the mean gray of the image, saturation and hue about the gray axis.
    """
    gray_3 = torch.tensor([0.299, 0.587, 0.114])
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cosine, sine = math.cos(2 * math.pi * hue) * saturation, math.sin(2 * math.pi * hue) * saturation
    turned = torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
    matrix_33 = brightness * contrast * torch.linalg.solve(to_yiq, turned @ to_yiq)
    pixels_3P = image_3hw.contiguous().view(3, -1).float()
    offset = brightness * (1 - contrast) * (gray_3 @ pixels_3P.mean(-1))
    return torch.addmm(offset, matrix_33, pixels_3P).round_().clamp_(0, 255).to(torch.uint8).view(image_3hw.shape)


def _check_size(example: Mapping[str, Any], height: int, width: int, image_id: int) -> None:
    said_height, said_width = example.get("height"), example.get("width")
    if said_height is None or said_width is None or (said_height, said_width) == (height, width):
        return
    said = f"image {image_id} is {width} x {height} pixels, the annotation file says {said_width} x {said_height}"
    if (said_height, said_width) == (width, height):
        raise ValueError(
            f"{said}: width and height are swapped. The file carries an EXIF rotation, which is applied on reading; the "
            "annotations seem to be made on the unrotated picture"
        )
    raise ValueError(f"{said}: the boxes would be in the wrong place")


def _decode_masks(objects: Mapping[str, Any], rows: list[int], height: int, width: int) -> tuple[Tensor, Tensor]:
    """-> has_mask (n,) and masks (n, h, w), where an object without a segmentation has an empty mask."""
    segmentations, ids = objects.get("segmentation"), objects.get("id")
    if segmentations is None:
        raise ValueError("masks are asked for, but the data set has no `objects.segmentation`: load it with masks")
    masks = np.zeros((len(rows), height, width), dtype=bool)
    has_mask = np.zeros(len(rows), dtype=bool)
    for k, row in enumerate(rows):
        if segmentations[row]:
            annotation_id = None if ids is None else ids[row]
            masks[k] = decode_segmentation(segmentations[row], height, width, annotation_id=annotation_id)
            has_mask[k] = masks[k].any()
    return torch.from_numpy(has_mask), torch.from_numpy(masks)


def _resized(sample: Sample, height: int, width: int) -> Sample:
    old_height, old_width = sample.image_3hw.shape[-2:]
    if (height, width) == (old_height, old_width):
        return sample
    scale_x, scale_y = width / old_width, height / old_height
    masks_nhw, has_mask_n = sample.masks_nhw, sample.has_mask_n
    if masks_nhw is not None:
        # The image's own antialiased filter, so that mask and pixels stay aligned; what is left thinner than half a pixel
        # vanishes and counts as not given.
        shades_nhw = masks_nhw.to(torch.uint8) * 255
        masks_nhw = resize_pixels(shades_nhw, height, width).contiguous() >= 128
        has_mask_n = has_mask_n & masks_nhw.any(-1).any(-1)
    return replace(
        sample,
        image_3hw=resize_pixels(sample.image_3hw, height, width),
        boxes_n4=_clip(sample.boxes_n4 * torch.tensor([scale_x, scale_y, scale_x, scale_y]), height, width),
        masks_nhw=masks_nhw,
        has_mask_n=has_mask_n,
    )


def _mirrored(sample: Sample) -> Sample:
    width = sample.image_3hw.shape[-1]
    x1, y1, x2, y2 = sample.boxes_n4.unbind(-1)
    return replace(
        sample,
        image_3hw=sample.image_3hw.flip(-1),
        boxes_n4=torch.stack([width - x2, y1, width - x1, y2], -1),
        masks_nhw=None if sample.masks_nhw is None else sample.masks_nhw.flip(-1),
    )


def _clip(boxes_n4: Tensor, height: int, width: int) -> Tensor:
    limit_4 = torch.tensor([width, height, width, height], dtype=boxes_n4.dtype)
    return boxes_n4.clamp(min=0).minimum(limit_4)


def _box_sides(boxes_n4: Tensor) -> Tensor:
    """Widths and heights -> (n, 2)."""
    return boxes_n4[:, 2:] - boxes_n4[:, :2]


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
