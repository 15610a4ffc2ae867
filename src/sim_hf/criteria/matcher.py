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
_CELLS_AT_A_TIME = 2**23  # of mask logits: small images share a call, which costs more than their pairs with each other


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
        batch_size = len(layers[0][1])
        cells_of_image = sum(masks[0].numel() for _, masks in layers)
        step = max(_CELLS_AT_A_TIME // max(cells_of_image, 1), 1)
        parts = [slice(start, min(start + step, batch_size)) for start in range(0, batch_size, step)]
        image_ids_G = targets.image_ids_G.cpu()
        rows_of_part = [((image_ids_G >= part.start) & (image_ids_G < part.stop)).nonzero()[:, 0] for part in parts]
        given = [(part, rows) for part, rows in zip(parts, rows_of_part, strict=True) if len(rows) > 0]
        costs_LBQG = [
            self._costs([(classes[part], masks[part]) for classes, masks in layers], targets.select(rows.to(device)), global_step)
            for part, rows in given
        ]
        pairs_of_layer: list[list[np.ndarray]] = [[np.zeros((3, 0), dtype=np.int64)] for _ in layers]
        for (part, rows), cost_LBQG in zip(given, _to_host(costs_LBQG), strict=True):
            image_ids = image_ids_G[rows].numpy()
            for image in np.unique(image_ids):
                (own,) = np.nonzero(image_ids == image)
                for pairs, cost_BQG in zip(pairs_of_layer, cost_LBQG, strict=True):
                    queries, instances = linear_sum_assignment(cost_BQG[image - part.start][:, own])
                    pairs.append(np.stack([np.full_like(queries, image), queries, rows.numpy()[own[instances]]]))
        joined = [np.concatenate(pairs, axis=1) for pairs in pairs_of_layer]
        pairs_3N = torch.from_numpy(np.concatenate(joined, axis=1)).to(device)  # one transfer, as before
        return [Matches(*part_3N) for part_3N in pairs_3N.split([part.shape[1] for part in joined], 1)]

    @torch.no_grad()
    def nearest(self, layer: tuple[Tensor, Tensor], targets: InstanceTargets, count: int, *, global_step: int) -> Matches:
        """The `count` cheapest queries of every instance, cheapest first; a query may be taken by several instances."""
        classes, masks = layer
        found = [torch.zeros(3, 0, dtype=torch.int64, device=masks.device)]
        for image in range(len(masks)):
            (rows_G,) = (targets.image_ids_G == image).nonzero(as_tuple=True)
            if len(rows_G) == 0:
                continue
            own = (classes[image : image + 1], masks[image : image + 1])
            cost_QG = self._costs([own], targets.select(rows_G), global_step)[0, 0].nan_to_num(nan=WORST_COST)
            queries_KG = cost_QG.topk(min(count, len(cost_QG)), dim=0, largest=False).indices
            rows_KG = rows_G.expand_as(queries_KG)
            found.append(torch.stack([torch.full_like(queries_KG, image), queries_KG, rows_KG]).flatten(1))
        return Matches(*torch.cat(found, dim=1))

    def _costs(self, layers: Sequence[tuple[Tensor, Tensor]], targets: InstanceTargets, global_step: int) -> Tensor:
        """Costs of some images in every layer with all instances of these images -> (layers, B, Q, G), float32.

        A cost is a query's own, so all layers and images are one call; nobody reads the pairs of two images."""
        class_logits_LBQK, mask_logits_LBQHW = (torch.stack(parts) for parts in zip(*layers, strict=True))
        probability_LBQG = class_logits_LBQK.float().softmax(-1)[..., targets.class_labels_G]
        mask_cost = self.mask_criterion.matching_cost(mask_logits_LBQHW.flatten(0, 2), targets, global_step=global_step)
        return self.class_cost * (1 - probability_LBQG) + self.mask_cost * mask_cost.float().view_as(probability_LBQG)


def _to_host(costs: Sequence[Tensor]) -> list[np.ndarray]:
    """Tensors of different shapes to NumPy through one copy, finite."""
    if not costs:
        return []
    flat = torch.cat([cost.flatten() for cost in costs]).nan_to_num(nan=WORST_COST, posinf=WORST_COST, neginf=-WORST_COST)
    parts = flat.cpu().split([cost.numel() for cost in costs])
    return [part.reshape(cost.shape).numpy() for part, cost in zip(parts, costs, strict=True)]
