"""Boxes in, masks out: one mask for every given box of a picture.

The network sees the whole picture and enlarged windows around the small boxes, narrow and wide (`label_views.py`), where even
a small object is many cells of the mask grid. In each view every query is weighed by how well its mask, cut to the box, agrees
with the box: positive mask weighting (SIM, Eq. 6) at inference. A network that takes box prompts is also asked for the box
itself, and its answer is one more query, which counts `prompt_weight` times. The weighted map is thresholded where its extent
agrees best with the box. The less the queries agree with the box, the more a rounded blob inside it takes their place. Where
boxes overlap, their masks compete for the pixels, as SIM's pseudo masks do in training.

Shape letters: Q queries, n boxes of the picture, K classes, h w mask grid or box region, H W pixels of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from sim_hf.evaluation.prediction import evaluating
from sim_hf.label_views import Region, View, pixel_region, views_of
from sim_hf.mask_generation.pixel_competition import RADIUS, centrality, pixel_share
from sim_hf.structures import box_iou_pairwise, box_masks, mask_boxes

_THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2)  # the first wins ties


@dataclass
class LabelOptions:
    """crop_below: boxes whose longer side is below this share of the picture's get enlarged views as well (0: never, 1:
    always), one for each of crop_margins: what the view adds around the box, as a share of its longer side (neighbours of a
    similar size share it; one wide margin is fastest). flip: every view is also looked at mirrored. prompt_weight: how many
    queries the answer to a box prompt counts for. mu: sharpness of the weighting. class_weight: how much the given class
    counts in it. fit_threshold: choose the threshold by the box, not 0.5. trust_power: the queries' part against the blob's
    is agreement^trust_power. blob_radius: where the blob has faded to 0, in half sides of the box. pixel_competition: masks
    whose boxes overlap share the pixels there.
    """

    crop_below: float = 0.5
    crop_margins: tuple[float, ...] = (0.2, 0.6, 1.2)
    flip: bool = True
    prompt_weight: float = 3.0
    mu: float = 5.0
    class_weight: float = 1.0
    fit_threshold: bool = True
    trust_power: float = 2.0
    blob_radius: float = 1.25
    pixel_competition: bool = True
    batch_size: int = 8

    def __post_init__(self) -> None:
        if any(not 0 <= margin < math.inf for margin in self.crop_margins):
            raise ValueError(f"crop_margins must be 0 or more, as shares of a box's longer side, got {self.crop_margins}")


@dataclass
class BoxMasks:
    """The masks of a picture's boxes, each kept as the part inside its box (a large picture with many boxes stays small).

    crops: bool (h, w) per box; corners: (left, top) of each crop in the picture; size: (H, W). confidence_n: 0..1, mean mask
    probability inside the mask times the queries' agreement with the box; near 0 where the network found nothing there.
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
    boxes_n4: Tensor | Sequence[Sequence[float]],
    labels_n: Sequence[int | None] | None = None,
    options: LabelOptions | None = None,
) -> BoxMasks:
    """One mask per box. boxes_n4: xyxy pixels of `picture` (RGB). labels_n: the model's label of each box, None if unknown.

    Examples:
        >>> from sim_hf import SIMForInstanceSegmentation, SIMImageProcessor
        >>> from sim_hf.data import read_image
        >>> model = SIMForInstanceSegmentation.from_pretrained("assets/sim-tiny")
        >>> processor = SIMImageProcessor.from_pretrained("assets/sim-tiny")
        >>> found = masks_for_boxes(model, processor, read_image("photo.jpg"), [[40, 30, 200, 160]])
        >>> found.masks().shape == (1, *found.size), bool(found.mask(0)[:30].any())
        (True, False)
    """
    options = options or LabelOptions()
    height, width = picture.height, picture.width
    boxes_n4 = torch.as_tensor(boxes_n4, dtype=torch.float32).cpu().reshape(-1, 4)
    num_boxes = len(boxes_n4)
    labels = [None] * num_boxes if labels_n is None else list(labels_n)
    views = views_of(picture.size, boxes_n4, small=options.crop_below, margins=options.crop_margins, mirrored=options.flip)
    sums = [_WeightedMap.empty(pixel_region(box_4, height, width)) for box_4 in boxes_n4]
    for start in range(0, len(views), options.batch_size):
        _add_views(model, processor, picture, views[start : start + options.batch_size], boxes_n4, labels, options, sums)
    maps = [_blended(total, options) for total in sums]
    if options.pixel_competition:
        maps = _competed(maps, [total.region for total in sums])
    decided = [_decide(*parts, options) for parts in zip(maps, sums, boxes_n4, strict=True)]
    return BoxMasks(
        crops=[crop for crop, _ in decided],
        corners=[total.region[:2] for total in sums],
        size=(height, width),
        confidence_n=torch.tensor([confidence for _, confidence in decided]),
    )


# Picture (RGB), boxes (n, 4) in its pixels, xyxy, and their labels (None: unknown) -> a mask for each box.
Labeller = Callable[[Image.Image, Tensor, Sequence[int | None]], BoxMasks]


def network_labeller(model: nn.Module, processor, options: LabelOptions | None = None) -> Labeller:
    """`masks_for_boxes` of a network, as it is when it is asked."""

    def label(picture: Image.Image, boxes_n4: Tensor, labels_n: Sequence[int | None]) -> BoxMasks:
        with evaluating(model):
            return masks_for_boxes(model, processor, picture, boxes_n4, labels_n, options)

    return label


@dataclass
class _WeightedMap:
    """Sums over queries and views for one box: weight * probability inside the box's pixels, weight * agreement, weight."""

    region: Region
    map_hw: Tensor
    agreement: float = 0.0
    weight: float = 0.0

    @classmethod
    def empty(cls, region: Region) -> _WeightedMap:
        left, top, right, bottom = region
        return cls(region, torch.zeros(bottom - top, right - left))

    @property
    def probability_hw(self) -> Tensor:
        return self.map_hw / max(self.weight, 1e-12)

    @property
    def mean_agreement(self) -> float:
        return self.agreement / max(self.weight, 1e-12)


def _add_views(model, processor, picture, views: list[View], boxes_n4: Tensor, labels, options: LabelOptions, sums) -> None:
    """Run a batch of views and add what they say about each of their boxes to `sums`, in place."""
    device = next(model.parameters()).device
    inputs = processor([view.pixels(picture) for view in views], return_tensors="pt")
    sizes_B2 = torch.tensor([[int(side) for side in size] for size in inputs["input_sizes"]])
    boxes = [
        view.boxes(boxes_n4) * torch.tensor([width / view.size[0], height / view.size[1]] * 2)
        for view, (height, width) in zip(views, sizes_B2.tolist(), strict=True)
    ]
    asked = {}
    if getattr(model.config, "box_prompts", False):
        asked = {"prompt_boxes": nn.utils.rnn.pad_sequence(boxes, batch_first=True).to(device)}
    outputs = model(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device), **asked)
    probability_BQK = outputs.class_queries_logits.float().softmax(-1).cpu()
    mask_BQhw = outputs.masks_queries_logits.float().sigmoid().cpu()
    if asked:
        answer_BPK = outputs.class_prompts_logits.float().softmax(-1).cpu()
        answer_BPhw = outputs.masks_prompts_logits.float().sigmoid().cpu()
    padded = tuple(inputs["pixel_values"].shape[-2:])
    stride = padded[0] / mask_BQhw.shape[-2]
    for row, view in enumerate(views):
        height, width = sizes_B2[row].tolist()
        for place, owner in enumerate(view.owners):
            probability_QK, mask_Qhw, counts_Q = probability_BQK[row], mask_BQhw[row], torch.ones(mask_BQhw.shape[1])
            if asked:
                probability_QK = torch.cat([probability_QK, answer_BPK[row, place, None]])
                mask_Qhw = torch.cat([mask_Qhw, answer_BPhw[row, place, None]])
                counts_Q = torch.cat([counts_Q, torch.tensor([options.prompt_weight])])
            weight_Q, agreement_Q = _weigh_queries(probability_QK, mask_Qhw, boxes[row][place], labels[owner], stride, options)
            weight_Q = weight_Q * counts_Q
            map_11hw = torch.einsum("q,qhw->hw", weight_Q, mask_Qhw)[None, None]
            map_11hw = functional.interpolate(map_11hw, padded, mode="bilinear")[:, :, :height, :width]
            total = sums[owner]
            total.map_hw += _seen(map_11hw, view, total.region)
            total.agreement += float((weight_Q * agreement_Q).sum())
            total.weight += float(weight_Q.sum())


def _seen(map_11hw: Tensor, view: View, region: Region) -> Tensor:
    """A view's map at the size of the picture, in a region of it -> (height, width). The same as resizing the whole map,
    without the millions of pixels around a small box."""
    left, top, right, bottom = region
    x = (2 * (torch.arange(left, right) - view.region[0]) + 1) / view.size[0] - 1  # -1..1 from side to side
    y = (2 * (torch.arange(top, bottom) - view.region[1]) + 1) / view.size[1] - 1
    grid = torch.stack(torch.broadcast_tensors(-x if view.mirrored else x, y[:, None]), dim=-1)[None]
    return functional.grid_sample(map_11hw, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]


def _weigh_queries(
    probability_QK: Tensor, mask_Qhw: Tensor, box_4: Tensor, label: int | None, stride: float, options: LabelOptions
) -> tuple[Tensor, Tensor]:
    """exp(mu * agreement) * P(class)^class_weight of each query, and the agreement: IoU of its mask's extent in the box with
    the box -> (Q,), (Q,)."""
    height, width = mask_Qhw.shape[-2:]
    inside_hw = box_masks(box_4[None], height, width, stride)[0]
    extent_Q4 = mask_boxes((mask_Qhw > 0.5) & inside_hw)
    agreement_Q = box_iou_pairwise(extent_Q4, mask_boxes(inside_hw[None]).expand(len(extent_Q4), -1))
    known_Q = 1 - probability_QK[:, -1] if label is None else probability_QK[:, label]
    return (options.mu * agreement_Q).exp() * known_Q.clamp(min=1e-4) ** options.class_weight, agreement_Q


def _blended(total: _WeightedMap, options: LabelOptions) -> Tensor:
    """Mask probability inside the box, the blob in its place as far as the queries do not agree with the box -> (h, w)."""
    probability_hw, trust = total.probability_hw, total.mean_agreement**options.trust_power
    return trust * probability_hw + (1 - trust) * _blob(probability_hw, options.blob_radius)


def _competed(maps: Sequence[Tensor], regions: Sequence[Region]) -> list[Tensor]:
    """What each box keeps of its map against its strongest rival at every pixel (`pixel_competition.py`)."""
    scores = [map_hw * _blob(map_hw, RADIUS) for map_hw in maps]
    kept = []
    for i, map_hw in enumerate(maps):
        rival_hw = torch.zeros_like(map_hw)
        for j, (left, top, right, bottom) in enumerate(regions):
            x1, y1, x2, y2 = regions[i]
            x1, y1, x2, y2 = max(x1, left), max(y1, top), min(x2, right), min(y2, bottom)
            if j != i and x1 < x2 and y1 < y2:
                mine_hw = rival_hw[y1 - regions[i][1] : y2 - regions[i][1], x1 - regions[i][0] : x2 - regions[i][0]]
                torch.maximum(mine_hw, scores[j][y1 - top : y2 - top, x1 - left : x2 - left], out=mine_hw)
        kept.append(map_hw * pixel_share(scores[i], rival_hw))
    return kept


def _decide(blended_hw: Tensor, total: _WeightedMap, box_4: Tensor, options: LabelOptions) -> tuple[Tensor, float]:
    """The mask inside a box's pixels, and its confidence: mean probability in the mask times the queries' agreement."""
    own_box_4 = box_4 - torch.tensor([*total.region[:2]] * 2)
    thresholds = _THRESHOLDS if options.fit_threshold else _THRESHOLDS[:1]
    candidates = torch.stack([blended_hw > threshold for threshold in thresholds])
    fit = box_iou_pairwise(mask_boxes(candidates), own_box_4.expand(len(thresholds), -1))
    # A preference for 0.5: the extent alone says little when all thresholds touch the box.
    preference = torch.tensor([abs(threshold - 0.5) for threshold in thresholds])
    mask_hw = candidates[int((fit - 0.5 * preference).argmax())]
    if not bool(mask_hw.any()):
        return torch.ones_like(mask_hw), 0.0
    return mask_hw, float(total.probability_hw[mask_hw].mean()) * total.mean_agreement


def _blob(like_hw: Tensor, radius: float) -> Tensor:
    """What is likely inside a box when nothing else is known: 1 at its centre, 0 at `radius` half sides -> (h, w)."""
    height, width = like_hw.shape
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    return centrality(x[None], y[:, None], radius)
