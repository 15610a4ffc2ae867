"""Bipartite matching of queries and instances (DETR), from classes and whatever cost the supervision can compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sim_hf.criteria.base import MaskCriterion
from sim_hf.structures import InstanceTargets


class HungarianMatcher:
    """cost = class_cost * (1 - P(class)) + mask_cost * (the supervision's own cost); both parts are in 0..1.

    Shape letters: B images, Q queries, K classes (+ no-object), G instances.
    """

    def __init__(self, mask_criterion: MaskCriterion, *, class_cost: float = 2.0, mask_cost: float = 5.0) -> None:
        self.mask_criterion = mask_criterion
        self.class_cost = class_cost
        self.mask_cost = mask_cost

    @torch.no_grad()
    def __call__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        targets_of_image: Sequence[InstanceTargets],
        *,
        global_step: int,
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Match every layer (class logits (B, Q, K+1), mask logits (B, Q, H, W)) -> per layer and image the matched query
        and instance indices, the latter counted within the image. One transfer to the host for all layers of an image."""
        matched: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        for image, targets in enumerate(targets_of_image):
            costs_LQG = torch.stack([self._cost(c[image], m[image], targets, global_step) for c, m in layers])
            costs_LQG = torch.nan_to_num(costs_LQG, nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
            for layer, cost_QG in enumerate(costs_LQG):
                queries, instances = linear_sum_assignment(cost_QG)
                device = targets.boxes_G4.device
                matched[layer].append((torch.as_tensor(queries, device=device), torch.as_tensor(instances, device=device)))
        return matched

    def _cost(self, class_logits_QK: Tensor, mask_logits_QHW: Tensor, targets: InstanceTargets, global_step: int) -> Tensor:
        if len(targets) == 0:
            return class_logits_QK.new_zeros(class_logits_QK.shape[0], 0)
        probability_QG = class_logits_QK.softmax(-1)[:, targets.class_labels_G]
        mask_QG = self.mask_criterion.matching_cost(mask_logits_QHW, targets, global_step=global_step)
        return self.class_cost * (1 - probability_QG) + self.mask_cost * mask_QG
