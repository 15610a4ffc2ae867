"""SIM (CVPR 2023, arXiv 2303.08578): BoxInst plus pseudo masks from prototypes and the teacher, plus pasted instances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sim_hf.criteria.base import (
    in_few_calls,
    known_mask_losses,
    linear_warmup,
    masks_on_grid,
    sum_over_layers,
    zero_with_gradient,
)
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.level_set import LevelSetCriterion
from sim_hf.mask_generation import PseudoMaskGenerator
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions, PseudoMasks


class SIMCriterion(nn.Module):
    """L = L_projection + L_pairwise + lambda_1 L_pseudo + lambda_2 L_paste (Sec. 3.5).

    The pseudo masks are made once a step from the teacher's positives and shared by all decoder layers; during the warm-up
    only the prototypes learn. Pasted instances know their mask, so they take L_paste (Eq. 9) instead of L_pseudo (Eq. 8);
    instances with a real mask take neither.

    Beyond the paper, both off unless asked for: the pseudo mask loss of an instance weighed by the teacher's sureness
    (`pseudo_quality_weight`, BoxTeacher), and Box2Mask's energies on top (`level_set`, with `level_set_weight`). Where the
    generator has objects of few cells lean on an ellipse, lambda_1 of these goes to `small_weight`.

    Relations: owns a `BoxInstCriterion` (composition) and equals it when lambda_1 = 0 and nothing is pasted.
    """

    def __init__(
        self,
        box_criterion: BoxInstCriterion,
        generator: PseudoMaskGenerator,
        *,
        level_set: LevelSetCriterion | None = None,
        level_set_weight: float = 0.0,
        pseudo_weight: float = 0.5,
        pseudo_quality_weight: bool = False,
        small_weight: float = 5.0,
        paste_weight: float = 1.0,
        pseudo_start_step: int = 10_000,
        pseudo_ramp_steps: int = 0,
        prototype_start_step: int = 0,
    ) -> None:
        super().__init__()
        self.box_criterion = box_criterion
        self.generator = generator
        self.bank = generator.bank
        self.level_set = level_set
        self.level_set_weight = level_set_weight
        self.pseudo_weight = pseudo_weight
        self.pseudo_quality_weight = pseudo_quality_weight
        self.small_weight = small_weight
        self.paste_weight = paste_weight
        self.pseudo_start_step = pseudo_start_step
        self.pseudo_ramp_steps = pseudo_ramp_steps
        self.prototype_start_step = min(prototype_start_step, pseudo_start_step)

    def needs_teacher(self, global_step: int) -> bool:
        """Pasted masks are pseudo masks of earlier images: they need the teacher too."""
        return max(self.pseudo_weight, self.paste_weight) > 0 and global_step >= self.prototype_start_step

    def matching_cost(self, mask_logits_QHW: Tensor, targets: InstanceTargets, *, global_step: int) -> Tensor:
        return self.box_criterion.matching_cost(mask_logits_QHW, targets, global_step=global_step)

    def forward(
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
        students = in_few_calls(students)
        output = self.box_criterion(
            students, None, targets, images_BCHW, pixel_mask_BHW, num_instances=num_instances, global_step=global_step
        )
        output.losses["loss_pseudo_mask"] = zero_with_gradient(students)
        if teacher is not None and self.needs_teacher(global_step):
            pseudo = self.generator(teacher, targets, update_prototypes=self.training)
            output.pseudo_masks = pseudo
            output.diagnostics.update(self.generator.diagnostics(pseudo, targets))
            weight = self.pseudo_weight * self._pseudo_ramp(global_step)
            if weight > 0:
                applies_G = ~(targets.has_mask_G | targets.is_pasted_G)
                # What small objects lean on counts as a real mask does.
                weight_G = 1 + (self.small_weight / weight - 1) * pseudo.smallness_G
                if self.pseudo_quality_weight:
                    weight_G = weight_G * _sureness(teacher, pseudo)
                target_GHW, trusted_GHW = pseudo.soft_targets()
                bce, dice = known_mask_losses(students, target_GHW, applies_G, trusted_GHW, weight_G)
                output.losses["loss_pseudo_mask"] = weight * sum_over_layers([*bce, *dice], num_instances)
        height, width = students[0].mask_logits_NHW.shape[-2:]
        pasted_GHW = masks_on_grid(targets, targets.is_pasted_G, height, width)
        bce, dice = known_mask_losses(students, pasted_GHW, targets.is_pasted_G)
        output.losses["loss_paste"] = self.paste_weight * sum_over_layers([*bce, *dice], num_instances)
        if self.level_set is not None:
            energies = self.level_set(
                students, None, targets, images_BCHW, pixel_mask_BHW, num_instances=num_instances, global_step=global_step
            ).losses
            for name in ("loss_level_set", "loss_local_consistency"):
                output.losses[name] = self.level_set_weight * energies[name]
        return output

    def _pseudo_ramp(self, global_step: int) -> float:
        if global_step < self.pseudo_start_step:
            return 0.0
        return linear_warmup(global_step - self.pseudo_start_step + 1, self.pseudo_ramp_steps)


@torch.no_grad()
def _sureness(teacher: MaskPredictions, pseudo: PseudoMasks) -> Tensor:
    """sqrt(sqrt(class probability) * mean probability inside the pseudo mask), the best of an instance's positives -> (G,) in
    0..1 (BoxTeacher, Sec. 3.2)."""
    score_G = torch.zeros_like(pseudo.scores_G).scatter_reduce_(0, teacher.instance_ids_N, teacher.scores_N, "amax")
    return (score_G.sqrt() * pseudo.scores_G).sqrt()
