"""What a matching without masks can go by: the shadows of mask and box, or the mask's own box and the given one.

Shape letters: Q queries, G instances, H and W of the mask grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim_hf.criteria.base import grid_stride
from sim_hf.losses import box_projections, projection_cost
from sim_hf.structures import InstanceTargets, boxes_of_shadows

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0  # DETR's, and those of SIM's authors on Mask2Former (who add a box head)
MASK_COST = 5.0  # the weight of a mask cost in the matching, which the two above are relative to


def projection_matching_cost(mask_logits_QHW: Tensor, targets: InstanceTargets, *, exact_box_edges: bool = True) -> Tensor:
    """1 - Dice of the two one-dimensional projections, averaged over the axes -> (Q, G) in 0..1 (Box2Mask's matching)."""
    height, width = mask_logits_QHW.shape[-2:]
    stride = grid_stride(targets, mask_logits_QHW)
    rows_GH, columns_GW = box_projections(targets.boxes_G4, height, width, stride, whole_cells=not exact_box_edges)
    return projection_cost(mask_logits_QHW, rows_GH, columns_GW) / 2


@torch.no_grad()
def box_matching_cost(mask_logits_QHW: Tensor, targets: InstanceTargets) -> Tensor:
    """5 L1 + 2 (1 - GIoU) of the tight box of the predicted mask and the given box, in units of the input's sides -> (Q, G).

    Divided by 5, the usual weight of a mask cost, so that the matching as a whole has these weights. Relations:
    `projection_matching_cost` sees probabilities; this one sees the mask above one half only, and nothing where it is empty.
    """
    stride = grid_stride(targets, mask_logits_QHW)
    boxes_Q4 = boxes_of_shadows(mask_logits_QHW.amax(-1) > 0, mask_logits_QHW.amax(-2) > 0, stride)
    height, width = targets.input_size
    scale_4 = boxes_Q4.new_tensor([width, height, width, height])
    boxes_Q4, given_G4 = boxes_Q4 / scale_4, targets.boxes_G4 / scale_4
    distance_QG = torch.cdist(_centre_and_size(boxes_Q4), _centre_and_size(given_G4), p=1)
    return (L1_WEIGHT * distance_QG + GIOU_WEIGHT * (1 - generalized_iou(boxes_Q4, given_G4))) / MASK_COST


@dataclass(frozen=True)
class MatchingBy:
    """Gives the matcher a cost in place of the supervision's own, so that rows of a comparison can match alike."""

    cost: Callable[[Tensor, InstanceTargets], Tensor]

    def matching_cost(self, mask_logits_QHW: Tensor, targets: InstanceTargets, *, global_step: int) -> Tensor:
        """-> (Q, G)"""
        return self.cost(mask_logits_QHW, targets)


def generalized_iou(boxes_Q4: Tensor, others_G4: Tensor) -> Tensor:
    """IoU minus the share of the common hull that neither box covers (Rezatofighi et al. 2019) -> (Q, G) in -1..1.

    Boxes without area are no special case: they have IoU 0, and two of them at one place -1 as well.
    """
    boxes_Q14, others_1G4 = boxes_Q4[:, None], others_G4[None]
    low, high = torch.maximum(boxes_Q14, others_1G4), torch.minimum(boxes_Q14, others_1G4)
    intersection_QG = (high[..., 2:] - low[..., :2]).clamp(min=0).prod(-1)
    hull_QG = (low[..., 2:] - high[..., :2]).clamp(min=0).prod(-1)
    area_Q1, area_1G = ((boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (boxes_Q14, others_1G4))
    union_QG = area_Q1 + area_1G - intersection_QG
    tiny = torch.finfo(union_QG.dtype).tiny
    covered_QG = torch.where(hull_QG > 0, union_QG / hull_QG.clamp(min=tiny), 0)
    return intersection_QG / union_QG.clamp(min=tiny) + covered_QG - 1


def _centre_and_size(boxes_N4: Tensor) -> Tensor:
    return torch.cat([(boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2, boxes_N4[:, 2:] - boxes_N4[:, :2]], dim=1)
