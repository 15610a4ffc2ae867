"""Positive mask weighting: an instance's positives merged by how well their boxes fit (SIM, Eq. 6).

Shape letters: N positives (several may share an instance), G instances, R positives of one instance, X some of them,
V cells inside the boxes, H W mask grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.mask_generation.box_cells import BoxCells
from sim_hf.structures import box_iou_pairwise, boxes_of_shadows

_CELLS_AT_A_TIME = 2**18  # of all positives together


@torch.no_grad()
def predicted_boxes(mask_logits_NHW: Tensor, stride: float) -> Tensor:
    """Tight boxes of the predicted masks (probability above 0.5). -> (N, 4) xyxy input pixels, zeros for an empty mask"""
    # A row is occupied when its largest logit is above 0: no mask is made.
    return boxes_of_shadows(mask_logits_NHW.amax(-1) > 0, mask_logits_NHW.amax(-2) > 0, stride)


@torch.no_grad()
def positive_mask_weights(predicted_boxes_N4: Tensor, boxes_G4: Tensor, instance_ids_N: Tensor, *, mu: float = 5.0) -> Tensor:
    """w_n = exp(mu * IoU(predicted box, given box)), divided by the sum over the instance's positives. -> (N,) float32"""
    num_positives = len(instance_ids_N)
    if predicted_boxes_N4.shape != (num_positives, 4):
        raise ValueError(f"predicted boxes must be ({num_positives}, 4), got {tuple(predicted_boxes_N4.shape)}")
    if num_positives == 0:
        return torch.zeros(0, device=boxes_G4.device)
    exponent_N = mu * box_iou_pairwise(predicted_boxes_N4.float(), boxes_G4[instance_ids_N].float())
    rank_N, num_ranks = _rank_within_instance(instance_ids_N, len(boxes_G4))
    exponent_GR = exponent_N.new_full((len(boxes_G4), num_ranks), -torch.inf)
    exponent_GR[instance_ids_N, rank_N] = exponent_N
    return exponent_GR.softmax(-1)[instance_ids_N, rank_N]


@torch.no_grad()
def instance_probability_map(mask_logits_NHW: Tensor, weights_N: Tensor, instance_ids_N: Tensor, num_instances: int) -> Tensor:
    """M_I: weighted sum of the mask probabilities of an instance's positives. -> (G, H, W) float32

    0 everywhere for an instance without positives.
    """
    num_positives = len(instance_ids_N)
    if len(mask_logits_NHW) != num_positives or weights_N.shape != (num_positives,):
        raise ValueError(
            f"expected {num_positives} masks and weights, got {tuple(mask_logits_NHW.shape)} and {tuple(weights_N.shape)}"
        )
    map_GHW = torch.zeros(num_instances, *mask_logits_NHW.shape[1:], device=mask_logits_NHW.device)
    if num_positives == 0:
        return map_GHW
    # One positive of every instance at a time: no two rows write to the same map, so the sum has one order on any device,
    # and no more than G probability maps exist at once.
    rank_N, num_ranks = _rank_within_instance(instance_ids_N, num_instances)
    for rank in range(num_ranks):
        rows = (rank_N == rank).nonzero()[:, 0]
        probability_NHW = mask_logits_NHW[rows].float().sigmoid_()
        map_GHW.index_add_(0, instance_ids_N[rows], probability_NHW.mul_(weights_N[rows].float()[:, None, None]))
    return map_GHW


@torch.no_grad()
def instance_probabilities(mask_logits_NHW: Tensor, rows_GR: Tensor, weights_N: Tensor, cells: BoxCells) -> Tensor:
    """`instance_probability_map` at the cells inside the boxes only. -> (V,) float32

    rows_GR: `positives_by_instance`, for the instances of the cells.
    """
    num_cells = len(cells.cells_V)
    map_V = torch.zeros(num_cells, device=mask_logits_NHW.device)
    for rows_GX in rows_GR.split(max(_CELLS_AT_A_TIME // max(num_cells, 1), 1), dim=1):
        rows_XG = rows_GX.T.clamp(min=0)
        probability_XV = cells.pick_each(mask_logits_NHW, rows_XG).float().sigmoid_()
        probability_XV.mul_(weights_N[rows_XG].float().index_select(1, cells.instances_V))
        # Not a weight of 0: the row that stands in for a missing one may hold a NaN.
        probability_XV.masked_fill_((rows_GX.T < 0).index_select(1, cells.instances_V), 0.0)
        # One after the other: the order of the sum does not depend on how many are made at a time.
        for probability_V in probability_XV:
            map_V += probability_V
    return map_V


def positives_by_instance(instance_ids_N: Tensor, num_instances: int) -> Tensor:
    """Rows of the positives of every instance in their order, -1 where it has fewer than others. -> (G, R) int64"""
    rank_N, num_ranks = _rank_within_instance(instance_ids_N, num_instances)
    rows_GR = instance_ids_N.new_full((num_instances, num_ranks), -1)
    rows_GR[instance_ids_N, rank_N] = torch.arange(len(instance_ids_N), device=instance_ids_N.device)
    return rows_GR


def _rank_within_instance(instance_ids_N: Tensor, num_instances: int) -> tuple[Tensor, int]:
    """0 for the first positive of an instance, 1 for its second, ... -> (N,) int64, and how many there are at most"""
    order_N = instance_ids_N.argsort(stable=True)
    sizes_G = instance_ids_N.bincount(minlength=num_instances)
    first_G = sizes_G.cumsum(0) - sizes_G
    rank_N = torch.empty_like(instance_ids_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_G[instance_ids_N[order_N]]
    return rank_N, int(sizes_G.max()) if num_instances > 0 else 0
