"""The records that all layers speak, and the few box-to-grid conversions that every layer must do the same way.

Shape letters: B images, G annotated instances of the batch (flattened over images), N positives (predictions that are
assigned to an instance; several may share one), C channels, H and W rows and columns (of the input, or of the mask grid).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class InstanceTargets:
    """The annotated instances of a batch.

    boxes_G4: xyxy, pixels of the padded input, float32. class_labels_G, image_ids_G: int64; `image_ids_G` is the row of the
    batch. input_size: (height, width) of the padded input. num_images: B, which counts images without instances too.
    masks_GHW: bool, at input size, or None when no instance of the batch has one. has_mask_G: where `masks_GHW` holds a
    real (annotated) mask. is_pasted_G: instances that copy-paste put in; their row of `masks_GHW` is the pasted pseudo mask.
    """

    boxes_G4: Tensor
    class_labels_G: Tensor
    image_ids_G: Tensor
    input_size: tuple[int, int]
    num_images: int
    masks_GHW: Tensor | None = None
    has_mask_G: Tensor = None  # type: ignore[assignment]  # all False unless given
    is_pasted_G: Tensor = None  # type: ignore[assignment]  # likewise

    def __post_init__(self) -> None:
        num_instances = self.boxes_G4.shape[0]
        if self.boxes_G4.shape != (num_instances, 4):
            raise ValueError(f"boxes must be (G, 4) xyxy, got {tuple(self.boxes_G4.shape)}")
        for name, per_instance in (("class labels", self.class_labels_G), ("image ids", self.image_ids_G)):
            if per_instance.shape != (num_instances,):
                raise ValueError(f"expected {num_instances} {name}, one a box, got {tuple(per_instance.shape)}")
        masks_shape = (num_instances, *self.input_size)
        if self.masks_GHW is not None and self.masks_GHW.shape != masks_shape:
            raise ValueError(f"masks must be {masks_shape}, one a box at input size, got {tuple(self.masks_GHW.shape)}")
        none = torch.zeros(num_instances, dtype=torch.bool, device=self.boxes_G4.device)
        if self.has_mask_G is None:
            self.has_mask_G = none
        if self.is_pasted_G is None:
            self.is_pasted_G = none.clone()

    def __len__(self) -> int:
        return self.boxes_G4.shape[0]

    def select(self, index: Tensor) -> InstanceTargets:
        """The instances at `index` (integers or a boolean mask), same images."""
        return replace(
            self,
            boxes_G4=self.boxes_G4[index],
            class_labels_G=self.class_labels_G[index],
            image_ids_G=self.image_ids_G[index],
            masks_GHW=None if self.masks_GHW is None else self.masks_GHW[index],
            has_mask_G=self.has_mask_G[index],
            is_pasted_G=self.is_pasted_G[index],
        )

    def rank_in_image(self) -> Tensor:
        """0 for the first instance of an image, 1 for its second, ... (int64), in the order in which they are listed."""
        same_image_GG = self.image_ids_G[:, None] == self.image_ids_G
        return same_image_GG.tril(-1).sum(1)

    @classmethod
    def from_labels(cls, labels: Sequence[Mapping[str, Tensor]], input_size: tuple[int, int]) -> InstanceTargets:
        """Flatten the collator's `labels`: per image `boxes` (n, 4) xyxy pixels, `class_labels` (n,), and optionally
        `masks` (n, H, W) bool with `has_mask` (n,) bool (all True when left out)."""
        device = labels[0]["boxes"].device if labels else torch.device("cpu")
        boxes = [label["boxes"].reshape(-1, 4).float() for label in labels]
        image_ids = [torch.full((len(b),), i, dtype=torch.long, device=device) for i, b in enumerate(boxes)]
        masks, has_mask = None, torch.zeros(sum(len(b) for b in boxes), dtype=torch.bool, device=device)
        if any("masks" in label for label in labels):
            height, width = input_size
            rows, flags = [], []
            for label, b in zip(labels, boxes, strict=True):
                given = label.get("masks")
                if given is None:
                    rows.append(torch.zeros(len(b), height, width, dtype=torch.bool, device=device))
                    flags.append(torch.zeros(len(b), dtype=torch.bool, device=device))
                else:
                    rows.append(given.bool())
                    flags.append(label.get("has_mask", torch.ones(len(b), dtype=torch.bool, device=device)).bool())
            masks, has_mask = torch.cat(rows), torch.cat(flags)
        empty = torch.zeros(0, device=device)
        return cls(
            boxes_G4=torch.cat(boxes) if boxes else empty.reshape(0, 4),
            class_labels_G=torch.cat([label["class_labels"].long() for label in labels]) if labels else empty.long(),
            image_ids_G=torch.cat(image_ids) if boxes else empty.long(),
            input_size=(int(input_size[0]), int(input_size[1])),
            num_images=len(labels),
            masks_GHW=masks,
            has_mask_G=has_mask,
        )


@dataclass
class MaskPredictions:
    """The paper's positives: predictions that are assigned to an instance.

    mask_logits_NHW: logits on the mask grid (input size / stride). instance_ids_N: row of `InstanceTargets`; rows may share
    an instance. scores_N: probability of the instance's class. mask_features_BCHW: the mask features Z of the network that
    made the predictions, on the same grid. boxes_N4: the boxes that it predicted with them (xyxy, input pixels), None for a
    network that predicts none: its boxes are the extents of its masks.
    """

    mask_logits_NHW: Tensor
    instance_ids_N: Tensor
    scores_N: Tensor
    mask_features_BCHW: Tensor
    boxes_N4: Tensor | None = None

    def select(self, index: Tensor) -> MaskPredictions:
        """The predictions at `index` (integers or a boolean mask), same features."""
        return replace(
            self,
            mask_logits_NHW=self.mask_logits_NHW[index],
            instance_ids_N=self.instance_ids_N[index],
            scores_N=self.scores_N[index],
            boxes_N4=None if self.boxes_N4 is None else self.boxes_N4[index],
        )


@dataclass
class PseudoMasks:
    """Pseudo masks of a batch on the mask grid (SIM, Eq. 7 and 8).

    probabilities_GHW: the corrected map M. target_GHW: bool, M above the high threshold. trusted_GHW: bool, the pixels that
    count (W of Eq. 8). scores_G: mean probability inside the target, 0 where there is none. smallness_G: how far the instance's
    map is a guess at the shape of few cells (`mask_generation.small_objects`), 0 for all in the paper.
    """

    probabilities_GHW: Tensor
    target_GHW: Tensor
    trusted_GHW: Tensor
    scores_G: Tensor
    smallness_G: Tensor

    def soft_targets(self) -> tuple[Tensor, Tensor]:
        """What to train on: `target_GHW` as 0 and 1, and `trusted_GHW` -> two maps (G, H, W). An instance of few cells has its
        probabilities as they are, shares of cells, and none of them is ignored: half of its cells lie on its edge. Where nothing
        is trusted, nothing becomes so."""
        small_G11 = ((self.smallness_G > 0) & self.trusted_GHW.flatten(1).any(1))[:, None, None]
        target_GHW = torch.where(small_G11, self.probabilities_GHW, self.target_GHW.float())
        return target_GHW, self.trusted_GHW | (small_G11 & (self.probabilities_GHW > 0))


@dataclass
class CriterionOutput:
    """Named, already weighted losses (scalars with a gradient path), the pseudo masks of the batch if the criterion makes
    them, the positives of the final prediction (to look at, not to train on), and detached diagnostics."""

    losses: dict[str, Tensor]
    pseudo_masks: PseudoMasks | None = None
    positives: MaskPredictions | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        return torch.stack([loss.float() for loss in self.losses.values()]).sum()


def rasterize_boxes(boxes_G4: Tensor, height: int, width: int, stride: float) -> tuple[Tensor, Tensor]:
    """Boxes (xyxy, input pixels) on a grid of the given stride -> rows (G, height) and columns (G, width), bool.

    A cell belongs to the box when its centre does (a centre on the edge goes to the even cell, so that a mirrored box has
    the mirrored cells). A box without any centre keeps the one cell that holds its middle, so no instance vanishes.
    """

    def span(low_G: Tensor, high_G: Tensor, length: int) -> Tensor:
        first_G, last_G = (low_G / stride).round(), (high_G / stride).round()
        # No centre inside: not the rounded edge, which may be the cell beside the box, but the cell of the box's middle.
        first_G = torch.where(last_G > first_G, first_G, ((low_G + high_G) / (2 * stride)).floor())
        first_G = first_G.long().clamp(0, max(length - 1, 0))
        last_G = torch.maximum(last_G.long().clamp(max=length), first_G + 1)
        cells = torch.arange(length, device=boxes_G4.device)
        return (cells >= first_G[:, None]) & (cells < last_G[:, None])

    x1, y1, x2, y2 = boxes_G4.unbind(-1)
    return span(y1, y2, height), span(x1, x2, width)


def box_masks(boxes_G4: Tensor, height: int, width: int, stride: float) -> Tensor:
    """The boxes filled in, on the mask grid -> (G, height, width) bool."""
    rows_GH, columns_GW = rasterize_boxes(boxes_G4, height, width, stride)
    return rows_GH[:, :, None] & columns_GW[:, None, :]


def mask_boxes(masks_GHW: Tensor, stride: float = 1.0) -> Tensor:
    """Tight boxes of boolean masks -> (G, 4) xyxy in pixels (cells times stride), float32; zeros for an empty mask."""

    return boxes_of_shadows(masks_GHW.any(-1), masks_GHW.any(-2), stride)


def boxes_of_shadows(rows_GH: Tensor, columns_GW: Tensor, stride: float = 1.0) -> Tensor:
    """`mask_boxes` of masks that occupy these rows and columns (bool) -> (G, 4)."""

    def span(occupied_GL: Tensor) -> tuple[Tensor, Tensor]:
        length = occupied_GL.shape[-1]
        cells = torch.arange(length, device=occupied_GL.device)
        first_G = torch.where(occupied_GL, cells, length).amin(-1)
        last_G = torch.where(occupied_GL, cells + 1, 0).amax(-1)
        return first_G, last_G

    if rows_GH.shape[0] == 0:
        return torch.zeros(0, 4, device=rows_GH.device)
    x1, x2 = span(columns_GW)
    y1, y2 = span(rows_GH)
    boxes_G4 = torch.stack([x1, y1, x2, y2], -1).float() * stride
    return torch.where((x2 > 0)[:, None], boxes_G4, torch.zeros_like(boxes_G4))


def box_iou_pairwise(boxes_N4: Tensor, others_N4: Tensor) -> Tensor:
    """IoU of each box with the box in the same row, both xyxy -> (N,); 0 where the union is empty."""
    low = torch.maximum(boxes_N4[:, :2], others_N4[:, :2])
    high = torch.minimum(boxes_N4[:, 2:], others_N4[:, 2:])
    intersection_N = (high - low).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1) for b in (boxes_N4, others_N4)]
    return intersection_N / (areas[0] + areas[1] - intersection_N).clamp(min=1e-6)
