"""The paper: semantic-aware instance mask generation. Every function runs without gradients and in float32."""

from sim_hf.mask_generation.optimal_transport import sinkhorn_assignment
from sim_hf.mask_generation.positive_mask_weighting import (
    instance_probability_map,
    positive_mask_weights,
    predicted_boxes,
)
from sim_hf.mask_generation.prototype_bank import PrototypeBank
from sim_hf.mask_generation.pseudo_masks import PseudoMaskGenerator
from sim_hf.mask_generation.self_correction import adaptive_threshold, self_correction
from sim_hf.mask_generation.semantic_map import semantic_probability_map

__all__ = [
    "PrototypeBank",
    "PseudoMaskGenerator",
    "adaptive_threshold",
    "instance_probability_map",
    "positive_mask_weights",
    "predicted_boxes",
    "self_correction",
    "semantic_probability_map",
    "sinkhorn_assignment",
]
