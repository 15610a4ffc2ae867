"""Samples of different sizes to one padded, normalised batch.

Shape letters: B images, h w rows and columns of one image, H W of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DetectionCollator:
    """The batch that every driver feeds: images padded at the right and at the bottom to the largest of the batch, rounded
    up to a multiple of `size_divisor`, or to the fixed size `pad_to` (a side or (height, width)).

    image_mean, image_std: of RGB in 0..1. The padding is zero *after* normalisation, the mean colour. as_bytes: give what
    `normalized` turns into the batch, a fifth of its size: workers pass less on, and the device normalises and makes planes.
    """

    def __init__(
        self,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        size_divisor: int = 32,
        pad_to: int | tuple[int, int] | None = None,
        *,
        as_bytes: bool = False,
    ) -> None:
        if size_divisor < 1:
            raise ValueError(f"size_divisor must be at least 1, got {size_divisor}")
        self.image_mean = tuple(float(value) for value in image_mean)
        self.image_std = tuple(float(value) for value in image_std)
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(f"expected three means and three positive deviations, got {image_mean} and {image_std}")
        self.size_divisor = size_divisor
        self.as_bytes = as_bytes
        self.pad_to = (pad_to, pad_to) if isinstance(pad_to, int) else pad_to

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """-> `pixel_values` float32 (B, 3, H, W), `pixel_mask` int64 (B, H, W) and `labels`, one dict per image. As bytes,
        the values are uint8, the images' own, which lie pixel by pixel, and the mask is bool."""
        height, width = self._padded_size(samples)
        if self.as_bytes:
            pixel_values = _new_memory((len(samples), height, width, 3), np.uint8).permute(0, 3, 1, 2)
        else:
            pixel_values = _new_memory((len(samples), 3, height, width), np.float32)
        pixel_mask = _new_memory((len(samples), height, width), np.bool_ if self.as_bytes else np.int64)
        for k, sample in enumerate(samples):
            h, w = sample["image"].shape[-2:]
            if self.as_bytes:
                _put(sample["image"], pixel_values[k, :, :h, :w])
            else:
                normalize(sample["image"], self.image_mean, self.image_std, out=pixel_values[k, :, :h, :w])
            pixel_mask[k, :h, :w] = 1
            for values in (pixel_values[k], pixel_mask[k]):
                values[..., h:, :] = 0
                values[..., :h, w:] = 0
        labels = [_label(sample, height, width) for sample in samples]
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}

    def _padded_size(self, samples: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        if not samples:
            raise ValueError("a batch needs at least one sample")
        height, width = (max(sample["image"].shape[axis] for sample in samples) for axis in (-2, -1))
        if self.pad_to is None:
            return tuple(math.ceil(side / self.size_divisor) * self.size_divisor for side in (height, width))
        if height > self.pad_to[0] or width > self.pad_to[1]:
            raise ValueError(f"an image of {height} x {width} pixels does not fit into pad_to={self.pad_to}")
        return self.pad_to


def normalized(batch: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """A batch `as_bytes` -> bit for bit the batch that the same collator gives without it, made where its tensors are."""
    pixel_bytes = batch["pixel_values"]
    pixel_values = torch.empty(pixel_bytes.shape, dtype=torch.float32, device=pixel_bytes.device)  # planes, as without bytes
    normalize(pixel_bytes, mean, std, out=pixel_values)
    pixel_values.masked_fill_(~batch["pixel_mask"][:, None], 0)
    return {**batch, "pixel_values": pixel_values, "pixel_mask": batch["pixel_mask"].long()}


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """uint8 RGB (..., 3, H, W) -> float32, (value / 255 - mean) / std; written into `out`, if given."""
    if out is not None and out.shape != image.shape:  # copy_ would repeat the one channel of a gray image
        raise ValueError(f"expected an image of shape {tuple(out.shape)}, got {tuple(image.shape)}")
    mean_311, std_311 = _per_channel(mean, image), _per_channel(std, image)
    values = image.to(torch.float32, copy=True) if out is None else out.copy_(image)
    return values.mul_(1 / (255 * std_311)).sub_(mean_311 / std_311)


def denormalize(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised RGB (..., 3, H, W) -> RGB in 0..1, float32. The padding becomes the mean colour."""
    values = pixel_values.to(torch.float32)
    return (values * _per_channel(std, values) + _per_channel(mean, values)).clamp_(0, 1)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]


def _put(image: Tensor, out: Tensor) -> None:
    if image.shape != out.shape or image.dtype != torch.uint8:
        raise ValueError(f"expected a uint8 image of shape {tuple(out.shape)}, got {image.dtype} {tuple(image.shape)}")
    out.copy_(image)


def _new_memory(shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
    """numpy asks the system for large pages, where it has them: the first touch of a batch of 50 MB takes 2 ms, not 19."""
    return torch.from_numpy(np.empty(shape, dtype))


def _label(sample: Mapping[str, Any], height: int, width: int) -> dict[str, Tensor]:
    label = {
        "boxes": sample["boxes"].to(torch.float32).reshape(-1, 4),
        "class_labels": sample["class_labels"].to(torch.long),
        "image_id": torch.tensor([sample["image_id"]], dtype=torch.long),
        "orig_size": torch.tensor(sample["orig_size"], dtype=torch.long),
        "size": torch.tensor(sample["image"].shape[-2:], dtype=torch.long),
    }
    if "masks" in sample:
        masks = sample["masks"]
        padded = torch.zeros(len(masks), height, width, dtype=torch.bool)
        padded[:, : masks.shape[-2], : masks.shape[-1]] = masks
        label |= {"masks": padded, "has_mask": sample["has_mask"]}
    return label
