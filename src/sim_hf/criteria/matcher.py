"""Bipartite matching of queries and instances (DETR), from classes and whatever cost the supervision can compute.

Shape letters: B images, Q queries, K classes (+ no-object), G instances, N matched pairs, H and W of the mask grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sim_hf.criteria.base import MaskCriterion
from sim_hf.structures import InstanceTargets

WORST_COST = 1e6  # of a pair whose cost is not a number: it is matched last, and the matching exists


@dataclass(frozen=True)
class Matches:
    """The matched pairs of one decoder layer, image by image: query `queries_N` of image `images_N` takes the instance in row
    `instance_ids_N` of the batch's `InstanceTargets`."""

    images_N: Tensor
    queries_N: Tensor
    instance_ids_N: Tensor


class HungarianMatcher:
    """cost = class_cost * (1 - P(class)) + mask_cost * (the supervision's own cost); both parts are in 0..1."""

    def __init__(self, mask_criterion: MaskCriterion, *, class_cost: float = 2.0, mask_cost: float = 5.0) -> None:
        self.mask_criterion = mask_criterion
        self.class_cost = class_cost
        self.mask_cost = mask_cost

    @torch.no_grad()
    def __call__(self, layers: Sequence[tuple[Tensor, Tensor]], targets: InstanceTargets, *, global_step: int) -> list[Matches]:
        """Match every layer (class logits (B, Q, K+1), mask logits (B, Q, H, W)).

        An image with more instances than queries keeps the cheapest pairs. All costs of the batch reach the host in one
        transfer: waiting for the device once per image or layer would cost more than the matching.
        """
        device = targets.boxes_G4.device
        image_ids_G = targets.image_ids_G.cpu()
        images = image_ids_G.unique().tolist()
        rows_of_image = [(image_ids_G == image).nonzero()[:, 0] for image in images]
        costs_LQG = [
            self._costs(
                [(classes[image], masks[image]) for classes, masks in layers], targets.select(rows.to(device)), global_step
            )
            for image, rows in zip(images, rows_of_image, strict=True)
        ]
        pairs_of_layer: list[list[np.ndarray]] = [[np.zeros((3, 0), dtype=np.int64)] for _ in layers]
        for image, rows, cost_LQG in zip(images, rows_of_image, _to_host(costs_LQG), strict=True):
            for pairs, cost_QG in zip(pairs_of_layer, cost_LQG, strict=True):
                queries, instances = linear_sum_assignment(cost_QG)
                pairs.append(np.stack([np.full_like(queries, image), queries, rows.numpy()[instances]]))
        return [Matches(*torch.from_numpy(np.concatenate(pairs, axis=1)).to(device)) for pairs in pairs_of_layer]

    def _costs(self, layers_of_image: Sequence[tuple[Tensor, Tensor]], targets: InstanceTargets, global_step: int) -> Tensor:
        """Costs of one image in every layer -> (layers, Q, G), float32. A cost is a query's own, so all layers are one call."""
        class_logits_LQK, mask_logits_LQHW = (torch.stack(parts) for parts in zip(*layers_of_image, strict=True))
        probability_LQG = class_logits_LQK.float().softmax(-1)[..., targets.class_labels_G]
        mask_cost = self.mask_criterion.matching_cost(mask_logits_LQHW.flatten(0, 1), targets, global_step=global_step)
        return self.class_cost * (1 - probability_LQG) + self.mask_cost * mask_cost.float().view_as(probability_LQG)


def _to_host(costs: Sequence[Tensor]) -> list[np.ndarray]:
    """Tensors of different shapes to NumPy through one copy, finite."""
    if not costs:
        return []
    flat = torch.cat([cost.flatten() for cost in costs]).nan_to_num(nan=WORST_COST, posinf=WORST_COST, neginf=-WORST_COST)
    parts = flat.cpu().split([cost.numel() for cost in costs])
    return [part.reshape(cost.shape).numpy() for part, cost in zip(parts, costs, strict=True)]
