"""Box2Mask (arXiv 2212.01579) without its tree filter: masks from boxes through region energies and local consistency."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sim_hf.criteria.base import grid_stride, known_mask_losses, masks_on_grid, sum_over_layers
from sim_hf.criteria.matching_costs import projection_matching_cost
from sim_hf.losses import (
    box_projections,
    color_affinity,
    local_consistency_loss,
    projection_loss,
    region_energy,
    unit_features,
)
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions, box_masks

COLOR_SPREAD = 0.226  # standard deviation of ImageNet's colours in 0..1: the energy is of pixel values as networks see them


class LevelSetCriterion:
    """L = projection + region energy (0.05 on the image, 5 on features) + local consistency for instances with a box only,
    BCE + Dice where a real mask is given.

    The features are the network's mask features without gradient, as vectors of length 1. Box2Mask takes the mask itself,
    filtered along trees of the image's and of one learned feature's edges; that filter is a CUDA program of its own.

    Relations: the projection, the matching and the treatment of real masks are those of `BoxInstCriterion`; the pairwise
    term, which compares neighbours, gives way to terms that compare each pixel with the whole region, so there is no warm-up.
    """

    def __init__(
        self,
        *,
        projection_weight: float = 5.0,
        image_weight: float = 0.05,
        feature_weight: float = 5.0,
        consistency_weight: float = 0.2,
        consistency_iterations: int = 10,
        consistency_alpha: float = 0.3,
        dilation: int = 2,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        exact_box_edges: bool = True,
    ) -> None:
        self.projection_weight = projection_weight
        self.image_weight = image_weight
        self.feature_weight = feature_weight
        self.consistency_weight = consistency_weight
        self.consistency_iterations = consistency_iterations
        self.consistency_alpha = consistency_alpha
        self.dilation = dilation
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.exact_box_edges = exact_box_edges

    def needs_teacher(self, global_step: int) -> bool:
        return False

    def matching_cost(self, mask_logits_QHW: Tensor, targets: InstanceTargets, *, global_step: int) -> Tensor:
        """As `BoxInstCriterion` -> (Q, G)."""
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
        height, width = students[0].mask_logits_NHW.shape[-2:]
        stride = grid_stride(targets, students[0].mask_logits_NHW)
        rows_GH, columns_GW = box_projections(targets.boxes_G4, height, width, stride, whole_cells=not self.exact_box_edges)
        colors_BCHW, valid_BHW = colors_on_grid(images_BCHW, pixel_mask_BHW, height, width)
        affinity_BKHW = color_affinity(colors_BCHW, valid_BHW, dilation=self.dilation, alpha=self.consistency_alpha)
        map_BCHW = self._weighted_map(colors_BCHW, students[0].mask_features_BCHW)
        inside_GHW = box_masks(targets.boxes_G4, height, width, stride) & valid_BHW[targets.image_ids_G]
        projection, energy, consistency = [], [], []
        for student in students:
            chosen_N = (~targets.has_mask_G)[student.instance_ids_N].nonzero()[:, 0]
            logits_NHW, ids_N = student.mask_logits_NHW[chosen_N], student.instance_ids_N[chosen_N]
            inside_NHW, image_ids_N = inside_GHW[ids_N], targets.image_ids_G[ids_N]
            projection.append(projection_loss(logits_NHW, rows_GH[ids_N], columns_GW[ids_N]))
            energy.append(region_energy(logits_NHW, inside_NHW, map_BCHW, image_ids_N))
            consistency.append(
                local_consistency_loss(
                    logits_NHW,
                    inside_NHW,
                    affinity_BKHW,
                    image_ids_N,
                    dilation=self.dilation,
                    num_iterations=self.consistency_iterations,
                )
            )
        bce, dice = known_mask_losses(students, masks_on_grid(targets, targets.has_mask_G, height, width), targets.has_mask_G)
        return CriterionOutput(
            {
                "loss_projection": self.projection_weight * sum_over_layers(projection, num_instances),
                "loss_level_set": sum_over_layers(energy, num_instances),
                "loss_local_consistency": self.consistency_weight * sum_over_layers(consistency, num_instances),
                "loss_mask": self.mask_weight * sum_over_layers(bce, num_instances),
                "loss_dice": self.dice_weight * sum_over_layers(dice, num_instances),
            }
        )

    @torch.no_grad()
    def _weighted_map(self, colors_BCHW: Tensor, features_BCHW: Tensor) -> Tensor:
        """Colours and features as one map whose energy is the weighted sum of theirs: energies add up over the channels."""
        color_scale = (self.image_weight / colors_BCHW.shape[1]) ** 0.5 / COLOR_SPREAD  # Box2Mask: mean over the channels
        return torch.cat([color_scale * colors_BCHW, self.feature_weight**0.5 * unit_features(features_BCHW)], dim=1)


@torch.no_grad()
def colors_on_grid(images_BCHW: Tensor, pixel_mask_BHW: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Mean colour of each cell (B, C, height, width), and whether all of the cell is image (B, height, width)."""
    colors_BCHW = functional.adaptive_avg_pool2d(images_BCHW.float(), (height, width))
    covered_BHW = functional.adaptive_avg_pool2d((pixel_mask_BHW != 0).float()[:, None], (height, width))[:, 0]
    return colors_BCHW, covered_BHW == 1
