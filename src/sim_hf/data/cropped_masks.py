"""The masks of an image as the parts in their boxes: read like a tensor of full masks, encoded without making one.

Shape letters: n masks, H W rows and columns of the image, S T columns and rows of one mask's box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from sim_hf.data.masks import encode_crop


class CroppedMasks:
    """`crops`: the masks inside their boxes, (S, T) bool on the CPU, column by column. corners_n2: column and row of each
    crop's first pixel. size: (height, width) of the image.

    Like a tensor (n, H, W): `len`, iteration, `masks[3]` -> (H, W), `masks[chosen_n]` with a tensor of rows or of booleans.
    """

    def __init__(self, crops: Sequence[Tensor], corners_n2: Tensor, size: tuple[int, int]) -> None:
        if corners_n2.shape != (len(crops), 2):
            raise ValueError(f"expected a corner for each of {len(crops)} crops, got {tuple(corners_n2.shape)}")
        self.crops = list(crops)
        self.corners_n2 = corners_n2
        self.size = size

    def __len__(self) -> int:
        return len(self.crops)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, chosen: int) -> Tensor: ...
    @overload
    def __getitem__(self, chosen: Tensor) -> CroppedMasks: ...
    def __getitem__(self, chosen: int | Tensor) -> Tensor | CroppedMasks:
        if isinstance(chosen, Tensor) and chosen.ndim:
            rows = torch.arange(len(self))[chosen.cpu()]
            return CroppedMasks([self.crops[row] for row in rows.tolist()], self.corners_n2[rows], self.size)
        crop_ST = self.crops[int(chosen)]
        left, top = self.corners_n2[int(chosen)].tolist()
        mask_HW = torch.zeros(self.size, dtype=torch.bool)
        mask_HW[top : top + crop_ST.shape[1], left : left + crop_ST.shape[0]] = crop_ST.T
        return mask_HW

    def run_lengths(self) -> list[dict[str, Any]]:
        """Each as `encode_rle` gives it for the full mask. A crop that several instances share is encoded once."""
        by_crop: dict[int, dict[str, Any]] = {}
        for crop_ST, (left, top) in zip(self.crops, self.corners_n2.tolist(), strict=True):
            if id(crop_ST) not in by_crop:
                by_crop[id(crop_ST)] = encode_crop(crop_ST.numpy(), left, top, self.size)
        return [dict(by_crop[id(crop_ST)]) for crop_ST in self.crops]
