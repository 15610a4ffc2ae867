"""Semantic probability map: how much a pixel looks like its class (SIM, Eq. 1).

Shape letters: B images, G instances, P distinct (image, class) pairs, C channels, L prototypes, H W mask grid, X a few
of the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.mask_generation.prototype_bank import PrototypeBank
from sim_hf.structures import InstanceTargets

_CHANNELS_AT_A_TIME = 8


@torch.no_grad()
def semantic_probability_map(
    features_BCHW: Tensor, bank: PrototypeBank, targets: InstanceTargets, *, temperature: float = 0.1
) -> Tensor:
    """M_S = sigmoid(max_l cos(z_i, p_l) / tau) for the class of every instance. -> (G, H, W) float32

    0.5 everywhere for a class without prototypes (see `bank.is_ready_K`). Made once per class and image, then shared by the
    instances of that class.
    """
    if features_BCHW.dim() != 4 or features_BCHW.shape[1] != bank.feature_dim:
        raise ValueError(f"features must be (B, {bank.feature_dim}, H, W), got {tuple(features_BCHW.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    height, width = features_BCHW.shape[-2:]
    if len(targets) == 0:
        return torch.zeros(0, height, width, device=features_BCHW.device)
    pairs_G = targets.image_ids_G * bank.num_classes + targets.class_labels_G
    pairs_P, pair_of_instance_G = pairs_G.unique(return_inverse=True)
    images_P = pairs_P // bank.num_classes
    images, pairs_per_image = images_P.unique_consecutive(return_counts=True)
    prototypes_PLC = bank.prototypes_KLC[pairs_P % bank.num_classes]
    similarity_PHW = torch.cat(
        [
            _similarity_to_nearest(features_BCHW[image], prototypes_NLC)
            for image, prototypes_NLC in zip(images.tolist(), prototypes_PLC.split(pairs_per_image.tolist()), strict=True)
        ]
    )
    return similarity_PHW.div_(temperature).sigmoid_()[pair_of_instance_G]


def _similarity_to_nearest(features_CHW: Tensor, prototypes_NLC: Tensor) -> Tensor:
    """Cosine of every pixel of one image with the nearest prototype of each of its classes. -> (N, H, W)"""
    with torch.autocast(device_type=features_CHW.device.type, enabled=False):
        features_CHW = features_CHW.float()
        products_NLHW = torch.einsum("nlc,chw->nlhw", prototypes_NLC, features_CHW)
        # The length is positive and common to all prototypes: dividing after the maximum saves a copy of the features.
        return products_NLHW.amax(1) / _length(features_CHW).clamp(min=torch.finfo(torch.float32).tiny)


def _length(features_CHW: Tensor) -> Tensor:
    """Length of every pixel's feature vector, a few channels at a time: no copy of the features. -> (H, W)"""
    squares_XHW = torch.zeros_like(features_CHW[:_CHANNELS_AT_A_TIME])
    for part_XHW in features_CHW.split(_CHANNELS_AT_A_TIME):
        squares_XHW[: len(part_XHW)].addcmul_(part_XHW, part_XHW)
    return squares_XHW.sum(0).sqrt_()
