"""Full supervision: Mask2Former's point-sampled BCE + Dice on real masks (arXiv 2112.01527, Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sim_hf.criteria.base import sum_over_layers, zero_with_gradient
from sim_hf.losses import bce_cost, dice_cost, masked_bce_loss, masked_dice_loss, sample_points, uncertain_points
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions


class FullySupervisedCriterion:
    """L = mask_weight * BCE + dice_weight * Dice at sampled points; instances without a real mask price nothing.

    Relations: Mask2Former's own loss, except that the candidate points are drawn once for a step and layer and shared by all
    instances (seeded by the step), so that the loss does not depend on how the batch is split, and matching uses Dice and
    BCE scaled to 0..1, so that every supervision matches with the same weights.
    """

    def __init__(
        self,
        *,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
    ) -> None:
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_ratio = importance_ratio

    def needs_teacher(self, global_step: int) -> bool:
        return False

    def matching_cost(self, mask_logits_QHW: Tensor, targets: InstanceTargets, *, global_step: int) -> Tensor:
        """Mean of Dice and BCE (squashed to 0..1) at points shared by all pairs -> (Q, G)."""
        num_queries, num_instances = mask_logits_QHW.shape[0], len(targets)
        if targets.masks_GHW is None:
            return mask_logits_QHW.new_zeros(num_queries, num_instances)
        points_P2 = _step_points(self._points_for(mask_logits_QHW), global_step, mask_logits_QHW.device)
        logits_QP = sample_points(mask_logits_QHW, points_P2.expand(num_queries, -1, -1))
        labels_GP = sample_points(targets.masks_GHW.float(), points_P2.expand(num_instances, -1, -1))
        cost_QG = (dice_cost(logits_QP, labels_GP) + bce_cost(logits_QP, labels_GP).tanh()) / 2
        return cost_QG * targets.has_mask_G

    def __call__(
        self,
        students: Sequence[MaskPredictions],
        teacher: MaskPredictions | None,
        targets: InstanceTargets,
        images_BCHW: Tensor,
        pixel_mask_BHW: Tensor,
        *,
        num_instances: float,
        global_step: int,
    ) -> CriterionOutput:
        bce, dice = [], []
        for layer, student in enumerate(students):
            if targets.masks_GHW is None:
                bce.append(zero_with_gradient([student]))
                dice.append(zero_with_gradient([student]))
                continue
            chosen_N = targets.has_mask_G[student.instance_ids_N].nonzero(as_tuple=True)[0]
            logits_NHW = student.mask_logits_NHW[chosen_N]
            masks_NHW = targets.masks_GHW[student.instance_ids_N[chosen_N]]
            generator = torch.Generator().manual_seed(global_step * 1000 + layer)
            points_NP2 = uncertain_points(
                logits_NHW.detach(),
                self._points_for(logits_NHW),
                oversample_ratio=self.oversample_ratio,
                importance_ratio=self.importance_ratio,
                generator=generator,
            )
            logits_NP = sample_points(logits_NHW, points_NP2)[:, None]
            labels_NP = sample_points(masks_NHW.float(), points_NP2)[:, None]
            bce.append(masked_bce_loss(logits_NP, labels_NP))
            dice.append(masked_dice_loss(logits_NP, labels_NP))
        return CriterionOutput(
            {
                "loss_mask": self.mask_weight * sum_over_layers(bce, num_instances),
                "loss_dice": self.dice_weight * sum_over_layers(dice, num_instances),
            }
        )

    def _points_for(self, mask_logits_NHW: Tensor) -> int:
        """No more points than cells of the grid: beyond that a point says nothing new."""
        return min(self.num_points, mask_logits_NHW.shape[-2] * mask_logits_NHW.shape[-1])


def _step_points(num_points: int, global_step: int, device: torch.device) -> Tensor:
    """Uniform points (1, P, 2) in 0..1, the same for all queries, images and splits of a step."""
    generator = torch.Generator().manual_seed(global_step)
    return torch.rand(1, num_points, 2, generator=generator).to(device)
