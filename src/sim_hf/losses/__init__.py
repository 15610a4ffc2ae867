"""Losses per instance, unreduced: the criterion divides by the number of instances of the whole optimiser step."""

from sim_hf.losses.bbtp import smoothness_loss, tightness_loss
from sim_hf.losses.color import rgb_to_lab
from sim_hf.losses.level_set import color_affinity, local_consistency_loss, region_energy, unit_features
from sim_hf.losses.mask_classification import (
    bce_cost,
    dice_cost,
    masked_bce_loss,
    masked_dice_loss,
    sample_points,
    uncertain_points,
)
from sim_hf.losses.pairwise import PairwiseEdges, color_similarity, half_ring_offsets, pairwise_edges, pairwise_loss
from sim_hf.losses.projection import box_projections, projection_cost, projection_loss

__all__ = [
    "PairwiseEdges",
    "bce_cost",
    "box_projections",
    "color_affinity",
    "color_similarity",
    "dice_cost",
    "half_ring_offsets",
    "local_consistency_loss",
    "masked_bce_loss",
    "masked_dice_loss",
    "pairwise_edges",
    "pairwise_loss",
    "projection_cost",
    "projection_loss",
    "region_energy",
    "rgb_to_lab",
    "sample_points",
    "smoothness_loss",
    "tightness_loss",
    "uncertain_points",
    "unit_features",
]
