"""BBTP (Hsu et al., NeurIPS 2019): masks from boxes by multiple-instance learning of their rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sim_hf.criteria.base import grid_stride, known_mask_losses, masks_on_grid, sum_over_layers
from sim_hf.criteria.matching_costs import projection_matching_cost
from sim_hf.losses import smoothness_loss, tightness_loss
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions, rasterize_boxes


class BBTPCriterion:
    """L = tightness + smoothness for instances with a box only, BCE + Dice where a real mask is given.

    Every row and column through the box holds a positive, every other line holds none. The smoothness weighs 0.05 of the
    tightness, as in the paper. Its mask head works on a crop around each box, where this one sees the whole picture.

    Relations: the tightness asks what BoxInst's projection asks, line by line with a cross-entropy instead of all lines
    together with Dice; the smoothness is a pairwise term that does not look at colours. The matching is that of
    `BoxInstCriterion`.
    """

    def __init__(
        self,
        *,
        tightness_weight: float = 5.0,
        smoothness_weight: float = 0.25,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
    ) -> None:
        self.tightness_weight = tightness_weight
        self.smoothness_weight = smoothness_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight

    def needs_teacher(self, global_step: int) -> bool:
        return False

    def matching_cost(self, mask_logits_QHW: Tensor, targets: InstanceTargets, *, global_step: int) -> Tensor:
        """As `BoxInstCriterion` -> (Q, G)."""
        return projection_matching_cost(mask_logits_QHW, targets)

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
        height, width = students[0].mask_logits_NHW.shape[-2:]
        stride = grid_stride(targets, students[0].mask_logits_NHW)
        rows_GH, columns_GW = rasterize_boxes(targets.boxes_G4, height, width, stride)
        tightness, smoothness = [], []
        for student in students:
            chosen_N = (~targets.has_mask_G)[student.instance_ids_N].nonzero()[:, 0]
            logits_NHW, ids_N = student.mask_logits_NHW[chosen_N], student.instance_ids_N[chosen_N]
            tightness.append(tightness_loss(logits_NHW, rows_GH[ids_N], columns_GW[ids_N]))
            smoothness.append(smoothness_loss(logits_NHW, rows_GH[ids_N], columns_GW[ids_N]))
        bce, dice = known_mask_losses(students, masks_on_grid(targets, targets.has_mask_G, height, width), targets.has_mask_G)
        return CriterionOutput(
            {
                "loss_tightness": self.tightness_weight * sum_over_layers(tightness, num_instances),
                "loss_smoothness": self.smoothness_weight * sum_over_layers(smoothness, num_instances),
                "loss_mask": self.mask_weight * sum_over_layers(bce, num_instances),
                "loss_dice": self.dice_weight * sum_over_layers(dice, num_instances),
            }
        )
