"""Is training from boxes working? Numbers that need no masks, and a warning in words when masks collapse.

Query decoders trained from boxes can end in two wrong solutions: every mask fills its box, or all masks have one shape.

Shape letters: N masks, H and W rows and columns of the mask grid, S side of the box-normalised masks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sim_hf.structures import rasterize_boxes

CORNER_SHARE = 0.15  # of a side of the box
CENTRE_SHARE = 1 / 3
NORMALISED_SIDE = 16


@torch.no_grad()
def instance_diagnostics(masks_NHW: Tensor, boxes_N4: Tensor, stride: float) -> dict[str, Tensor]:
    """Per mask, each (N,) in 0..1; `masks_NHW` holds probabilities or booleans, `boxes_N4` is xyxy in input pixels.

    fill: mask mass inside the box / box area (healthy 0.4 to 0.7). corners: coverage of the four corner patches, 15 % of
    each side. centre: coverage of the middle third. leak: share of the mask mass that lies outside of the box.
    """
    if masks_NHW.dim() != 3 or boxes_N4.shape != (len(masks_NHW), 4):
        raise ValueError(f"expected masks (N, H, W) and boxes (N, 4), got {tuple(masks_NHW.shape)}, {tuple(boxes_N4.shape)}")
    masks_NHW = masks_NHW.float()
    _, height, width = masks_NHW.shape
    rows_NH, columns_NW = rasterize_boxes(boxes_N4, height, width, stride)

    def coverage(part_NH: Tensor, part_NW: Tensor) -> tuple[Tensor, Tensor]:
        mass_N = torch.einsum("nhw,nh,nw->n", masks_NHW, part_NH.float(), part_NW.float())
        return mass_N, mass_N / (part_NH.sum(1) * part_NW.sum(1)).clamp(min=1)

    inside_N, fill_N = coverage(rows_NH, columns_NW)
    _, corners_N = coverage(_ends(rows_NH), _ends(columns_NW))
    _, centre_N = coverage(_middle(rows_NH), _middle(columns_NW))
    total_N = masks_NHW.sum((1, 2))
    leak_N = ((total_N - inside_N) / total_N.clamp(min=1e-6)).clamp(min=0)
    return {"fill": fill_N, "corners": corners_N, "centre": centre_N, "leak": leak_N}


@torch.no_grad()
def mask_diagnostics(masks_NHW: Tensor, boxes_N4: Tensor, stride: float, *, min_box_cells: int = 4) -> dict[str, Tensor]:
    """Means of `instance_diagnostics`, `shape_similarity` where there are two masks, and `num_instances`, as scalars.

    Boxes with a side below `min_box_cells` cells are left out: on so coarse a grid every mask fills its box. No instances
    (left) give an empty dict.
    """
    per_instance = instance_diagnostics(masks_NHW, boxes_N4, stride)
    _, height, width = masks_NHW.shape
    rows_NH, columns_NW = rasterize_boxes(boxes_N4, height, width, stride)
    large_N = (rows_NH.sum(1) >= min_box_cells) & (columns_NW.sum(1) >= min_box_cells)
    num_instances = int(large_N.sum())
    if num_instances == 0:
        return {}
    diagnostics = {name: values_N[large_N].mean() for name, values_N in per_instance.items()}
    if num_instances > 1:
        diagnostics["shape_similarity"] = shape_similarity(masks_NHW[large_N], boxes_N4[large_N], stride)
    diagnostics["num_instances"] = torch.tensor(num_instances, device=masks_NHW.device)
    return diagnostics


@torch.no_grad()
def shape_similarity(masks_NHW: Tensor, boxes_N4: Tensor, stride: float) -> Tensor:
    """Mean IoU over all pairs of masks, after each box is stretched to the same square -> scalar; 1 means one shape for all."""
    num_masks = len(masks_NHW)
    if num_masks < 2:
        raise ValueError(f"similarity of shapes needs at least two masks, got {num_masks}")
    shapes_NS = _box_normalised(masks_NHW.float(), boxes_N4, stride).flatten(1)
    intersection_NN = shapes_NS @ shapes_NS.T
    area_N = shapes_NS.sum(1)
    union_NN = area_N[:, None] + area_N[None, :] - intersection_NN
    iou_NN = intersection_NN / union_NN.clamp(min=1)
    return (iou_NN.sum() - iou_NN.diagonal().sum()) / (num_masks * (num_masks - 1))


def collapse_warning(
    diagnostics: Mapping[str, Tensor | float],
    *,
    max_fill: float = 0.95,
    max_corners: float = 0.9,
    max_shape_similarity: float = 0.9,
    min_instances: int = 4,
) -> str | None:
    """What is wrong and what to try, in words; None while the masks look alive, or when there are too few to tell."""
    if not diagnostics or float(diagnostics["num_instances"]) < min_instances:
        return None
    fill, corners = float(diagnostics["fill"]), float(diagnostics["corners"])
    if fill >= max_fill and corners >= max_corners:
        return (
            f"Masks fill their boxes: they cover {fill:.0%} of the box and {corners:.0%} of its corners (healthy: 40 to 70 % "
            "of the box). Try a lower pseudo-mask weight, a longer warm-up before pseudo masks, or more pairwise weight."
        )
    similarity = float(diagnostics.get("shape_similarity", 0.0))
    if similarity > max_shape_similarity:
        return (
            f"All masks have nearly the same shape: stretched to one size, two of them overlap with IoU {similarity:.2f} on "
            "average. Try a longer warm-up before pseudo masks, a lower pseudo-mask weight, or a lower learning rate."
        )
    return None


def _ranks(inside_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each cell within its span, from 0, and the length of the span (N, 1)."""
    return inside_NL.long().cumsum(1) - 1, inside_NL.sum(1, keepdim=True)


def _ends(inside_NL: Tensor) -> Tensor:
    """The first and last 15 % of a span, at least one cell each."""
    rank_NL, length_N1 = _ranks(inside_NL)
    end_N1 = (length_N1 * CORNER_SHARE).round().clamp(min=1)
    return inside_NL & ((rank_NL < end_N1) | (rank_NL >= length_N1 - end_N1))


def _middle(inside_NL: Tensor) -> Tensor:
    """The middle third of a span, at least one cell."""
    rank_NL, length_N1 = _ranks(inside_NL)
    offset_NL = (rank_NL + 0.5 - length_N1 / 2).abs()
    return inside_NL & (offset_NL <= (length_N1 * CENTRE_SHARE / 2).clamp(min=0.5))


def _box_normalised(masks_NHW: Tensor, boxes_N4: Tensor, stride: float) -> Tensor:
    """Each mask's box stretched to a square (N, S, S), 1 where the mask is above one half."""
    _, height, width = masks_NHW.shape
    x1, y1, x2, y2 = (boxes_N4.float() / stride).unbind(-1)
    centres_S = (torch.arange(NORMALISED_SIDE, device=masks_NHW.device) + 0.5) / NORMALISED_SIDE
    # grid_sample's coordinates: -1 and 1 are the outer edges of the grid
    x_NS = 2 * (x1[:, None] + (x2 - x1)[:, None] * centres_S) / width - 1
    y_NS = 2 * (y1[:, None] + (y2 - y1)[:, None] * centres_S) / height - 1
    grid_NSS2 = torch.stack(torch.broadcast_tensors(x_NS[:, None, :], y_NS[:, :, None]), -1)
    sampled_NSS = F.grid_sample(masks_NHW[:, None], grid_NSS2, padding_mode="border", align_corners=False)[:, 0]
    return (sampled_NSS > 0.5).float()
