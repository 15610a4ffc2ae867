"""Positive mask weighting: an instance's positives merged by how well their boxes fit (SIM, Eq. 6).

Shape letters: N positives (several may share an instance), G instances, R positives of one instance, H W mask grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.structures import box_iou_pairwise, boxes_of_shadows


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
    rank_N = _rank_within_instance(instance_ids_N, len(boxes_G4))
    exponent_GR = exponent_N.new_full((len(boxes_G4), int(rank_N.max()) + 1), -torch.inf)
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
    rank_N = _rank_within_instance(instance_ids_N, num_instances)
    for rank in range(int(rank_N.max()) + 1):
        rows = (rank_N == rank).nonzero()[:, 0]
        probability_NHW = mask_logits_NHW[rows].float().sigmoid_()
        map_GHW.index_add_(0, instance_ids_N[rows], probability_NHW.mul_(weights_N[rows].float()[:, None, None]))
    return map_GHW


def _rank_within_instance(instance_ids_N: Tensor, num_instances: int) -> Tensor:
    """0 for the first positive of an instance, 1 for its second, ... -> (N,) int64"""
    order_N = instance_ids_N.argsort(stable=True)
    sizes_G = instance_ids_N.bincount(minlength=num_instances)
    first_G = sizes_G.cumsum(0) - sizes_G
    rank_N = torch.empty_like(instance_ids_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_G[instance_ids_N[order_N]]
    return rank_N
