"""BoxInst (arXiv 2012.02310): masks from boxes through projection and pairwise colour affinity; the base of SIM."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sim_hf.criteria.base import grid_stride, in_few_calls, known_mask_losses, linear_warmup, masks_on_grid, sum_over_layers
from sim_hf.criteria.matching_costs import projection_matching_cost
from sim_hf.losses import (
    box_projections,
    color_similarity,
    pairwise_edges,
    pairwise_loss,
    projection_loss,
)
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions


class BoxInstCriterion:
    """L = projection + pairwise for instances with a box only, BCE + Dice where a real mask is given (mixed supervision).

    Relations: `SIMCriterion` adds pseudo masks and pasted instances on top of this one; with a pseudo weight of 0 and no
    pasting it equals this one exactly. The paper normalises the pairwise term over all pairs of the batch; here it is a mean
    over the pairs of an instance, then over instances, so that the gradient does not depend on how a batch is split.
    """

    def __init__(
        self,
        *,
        projection_weight: float = 5.0,
        pairwise_weight: float = 2.0,
        pairwise_warmup_steps: int = 10_000,
        color_threshold: float = 0.3,
        kernel_size: int = 3,
        dilation: int = 2,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        exact_box_edges: bool = True,
    ) -> None:
        self.projection_weight = projection_weight
        self.pairwise_weight = pairwise_weight
        self.pairwise_warmup_steps = pairwise_warmup_steps
        self.color_threshold = color_threshold
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.exact_box_edges = exact_box_edges

    def needs_teacher(self, global_step: int) -> bool:
        return False

    def matching_cost(self, mask_logits_QHW: Tensor, targets: InstanceTargets, *, global_step: int) -> Tensor:
        """1 - Dice of the two one-dimensional projections, averaged over the axes -> (Q, G) in 0..1 (Box2Mask's matching)."""
        return projection_matching_cost(mask_logits_QHW, targets, exact_box_edges=self.exact_box_edges)

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
        students = in_few_calls(students)
        height, width = students[0].mask_logits_NHW.shape[-2:]
        stride = grid_stride(targets, students[0].mask_logits_NHW)
        rows_GH, columns_GW = box_projections(targets.boxes_G4, height, width, stride, whole_cells=not self.exact_box_edges)
        similarity_BEHW = color_similarity(
            images_BCHW,
            pixel_mask_BHW.bool(),
            stride=round(stride),
            kernel_size=self.kernel_size,
            dilation=self.dilation,
        )
        edges = pairwise_edges(
            similarity_BEHW,
            targets.boxes_G4,
            targets.image_ids_G,
            stride=stride,
            threshold=self.color_threshold,
            dilation=self.dilation,
        )
        box_only_G = (~targets.has_mask_G).float()
        projection, pairwise = [], []
        for student in students:
            ids_N = student.instance_ids_N
            loss_N = projection_loss(student.mask_logits_NHW, rows_GH[ids_N], columns_GW[ids_N])
            projection.append(loss_N * box_only_G[ids_N])
            pairwise.append(pairwise_loss(student.mask_logits_NHW, ids_N, edges) * box_only_G[ids_N])
        warmup = linear_warmup(global_step, self.pairwise_warmup_steps)
        losses = {
            "loss_projection": self.projection_weight * sum_over_layers(projection, num_instances),
            "loss_pairwise": self.pairwise_weight * warmup * sum_over_layers(pairwise, num_instances),
        }
        # Named on every batch, with and without masks: loggers of several ranks need the same keys.
        bce, dice = known_mask_losses(students, masks_on_grid(targets, targets.has_mask_G, height, width), targets.has_mask_G)
        losses["loss_mask"] = self.mask_weight * sum_over_layers(bce, num_instances)
        losses["loss_dice"] = self.dice_weight * sum_over_layers(dice, num_instances)
        return CriterionOutput(losses)
