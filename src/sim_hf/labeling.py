"""Boxes in, masks out: one mask for every given box of a picture.

The network sees the whole picture and, box by box, an enlarged crop around each box, where even a small object is many cells
of the mask grid. In each view the query that fits the box best gives its mask; the views are averaged, cut to the box, and
thresholded where the mask's own extent agrees best with the box that the user gave.

Shape letters: Q queries, n boxes of the picture, K classes, h w mask grid, H W pixels of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from sim_hf.losses import box_projections, projection_cost
from sim_hf.structures import box_iou_pairwise, mask_boxes

_THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2)  # the first wins ties


@dataclass
class LabelOptions:
    """crop_margin: what is added around a box, as a share of its longer side; crops: look at each box enlarged;
    whole: look at the whole picture too; class_weight: how much the class counts beside the fit of the box."""

    crops: bool = True
    whole: bool = True
    crop_margin: float = 0.35
    class_weight: float = 0.5
    batch_size: int = 8
    fit_threshold: bool = True


@dataclass
class BoxMasks:
    """The masks of a picture's boxes, each kept as the part inside its box (a large picture with many boxes stays small).

    crops: bool (h, w) per box; corners: (left, top) of each crop in the picture; size: (H, W). confidence_n: 0..1, mean mask
    probability inside the mask times the agreement of its extent with the box; 0 where nothing fitted and the box itself
    was filled in.
    """

    crops: list[Tensor]
    corners: list[tuple[int, int]]
    size: tuple[int, int]
    confidence_n: Tensor

    def __len__(self) -> int:
        return len(self.crops)

    def mask(self, index: int) -> Tensor:
        """One mask at the size of the picture -> (H, W) bool."""
        mask_HW = torch.zeros(self.size, dtype=torch.bool)
        (left, top), crop = self.corners[index], self.crops[index]
        mask_HW[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        return mask_HW

    def masks(self) -> Tensor:
        """All masks -> (n, H, W) bool."""
        return (
            torch.stack([self.mask(i) for i in range(len(self))]) if len(self) else torch.zeros(0, *self.size, dtype=torch.bool)
        )


@torch.inference_mode()
def masks_for_boxes(
    model: nn.Module,
    processor,
    picture: Image.Image,
    boxes_n4: Tensor,
    labels_n: Sequence[int | None] | None = None,
    options: LabelOptions | None = None,
) -> BoxMasks:
    """One mask per box. boxes_n4: xyxy pixels of `picture` (RGB). labels_n: the model's label of each box, None if unknown."""
    options = options or LabelOptions()
    if not (options.crops or options.whole):
        raise ValueError("labelling needs the whole picture, the crops or both")
    num_boxes = len(boxes_n4)
    height, width = picture.height, picture.width
    boxes_n4 = boxes_n4.float().cpu().reshape(-1, 4)
    labels = [None] * num_boxes if labels_n is None else list(labels_n)
    windows = _windows(boxes_n4, height, width, options.crop_margin) if options.crops else []
    views = [(picture, [*range(num_boxes)], (0, 0))] if options.whole and num_boxes else []
    views += [(picture.crop(tuple(window)), [i], tuple(window[:2])) for i, window in enumerate(windows)]
    regions = [_pixel_region(box_4, height, width) for box_4 in boxes_n4]
    sums = [torch.zeros(bottom - top, right - left) for left, top, right, bottom in regions]
    for start in range(0, len(views), options.batch_size):
        _add_views(model, processor, views[start : start + options.batch_size], boxes_n4, labels, options, regions, sums)
    views_per_box = max(1, int(options.whole) + int(options.crops))
    decided = [
        _decide(total / views_per_box, box_4 - torch.tensor([*region[:2], *region[:2]]), options)
        for total, box_4, region in zip(sums, boxes_n4, regions, strict=True)
    ]
    return BoxMasks(
        crops=[crop for crop, _ in decided],
        corners=[(left, top) for left, top, _, _ in regions],
        size=(height, width),
        confidence_n=torch.tensor([confidence for _, confidence in decided]),
    )


def _pixel_region(box_4: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches, at least one, inside the picture -> (left, top, right, bottom)."""
    x1, y1, x2, y2 = box_4.tolist()
    left, top = min(max(int(x1), 0), width - 1), min(max(int(y1), 0), height - 1)
    right, bottom = min(width, math.ceil(x2)), min(height, math.ceil(y2))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _windows(boxes_n4: Tensor, height: int, width: int, margin: float) -> list[list[int]]:
    """Square windows around the boxes, enlarged by the margin, cut at the border of the picture."""
    windows = []
    for x1, y1, x2, y2 in boxes_n4.tolist():
        side = max(x2 - x1, y2 - y1) * (1 + 2 * margin)
        center_x, center_y = (x1 + x2) / 2, (y1 + y2) / 2
        left, top = max(0, int(center_x - side / 2)), max(0, int(center_y - side / 2))
        right, bottom = min(width, int(center_x + side / 2) + 1), min(height, int(center_y + side / 2) + 1)
        windows.append([left, top, max(right, left + 1), max(bottom, top + 1)])
    return windows


def _add_views(model, processor, views, boxes_n4, labels, options, regions, sums) -> None:
    """Run a batch of views and add the chosen queries' probabilities inside each box to `sums`, in place."""
    device = next(model.parameters()).device
    inputs = processor([view for view, _, _ in views], return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device))
    class_logits_BQK = outputs.class_queries_logits.float().cpu()
    mask_logits_BQhw = outputs.masks_queries_logits.float().cpu()
    padded = tuple(inputs["pixel_values"].shape[-2:])
    for row, (view, owners, (left, top)) in enumerate(views):
        input_size = tuple(int(side) for side in inputs["input_sizes"][row])
        scale = torch.tensor([input_size[1] / view.width, input_size[0] / view.height] * 2)
        boxes = (boxes_n4[owners] - torch.tensor([left, top, left, top])) * scale
        queries = _best_queries(
            class_logits_BQK[row], mask_logits_BQhw[row], boxes, [labels[i] for i in owners], padded[0], options
        )
        for owner, query in zip(owners, queries, strict=True):
            logits = functional.interpolate(mask_logits_BQhw[row, query][None, None], padded, mode="bilinear")
            logits = logits[:, :, : input_size[0], : input_size[1]]
            logits = functional.interpolate(logits, (view.height, view.width), mode="bilinear")[0, 0]
            x1, y1, x2, y2 = regions[owner]
            sums[owner] += logits[y1 - top : y2 - top, x1 - left : x2 - left].sigmoid()


def _best_queries(class_logits_QK, mask_logits_Qhw, boxes_n4, labels, input_height: int, options: LabelOptions) -> list[int]:
    """The query of each box: one-to-one by the fit of the projections and the class, as in training."""
    height, width = mask_logits_Qhw.shape[-2:]
    rows_nh, columns_nw = box_projections(boxes_n4, height, width, input_height / height)
    cost_Qn = projection_cost(mask_logits_Qhw, rows_nh, columns_nw) / 2
    probability_QK = class_logits_QK.softmax(-1)
    known_Qn = torch.stack([probability_QK[:, label] if label is not None else 1 - probability_QK[:, -1] for label in labels], -1)
    cost_Qn = cost_Qn + options.class_weight * (1 - known_Qn)
    if cost_Qn.shape[0] < cost_Qn.shape[1]:  # more boxes than queries: a query may serve several
        return cost_Qn.argmin(0).tolist()
    queries, owners = linear_sum_assignment(cost_Qn.numpy())
    return [int(q) for _, q in sorted(zip(owners, queries, strict=True))]


def _decide(probability_hw: Tensor, own_box_4: Tensor, options: LabelOptions) -> tuple[Tensor, float]:
    """Threshold the probabilities inside a box (given relative to them) where the mask's extent agrees best with it."""
    thresholds = _THRESHOLDS if options.fit_threshold else _THRESHOLDS[:1]
    candidates = torch.stack([probability_hw > threshold for threshold in thresholds])
    agreement = box_iou_pairwise(mask_boxes(candidates), own_box_4.expand(len(thresholds), -1))
    # A small preference for 0.5: the extent alone says little when all thresholds touch the box.
    preference = torch.tensor([abs(threshold - 0.5) for threshold in thresholds])
    best = int((agreement - 0.5 * preference).argmax())
    mask_hw = candidates[best]
    if not bool(mask_hw.any()):
        return torch.ones_like(mask_hw), 0.0
    return mask_hw, float(probability_hw[mask_hw].mean() * agreement[best])
