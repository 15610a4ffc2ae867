"""Semantic probability map: how much a pixel looks like its class (SIM, Eq. 1).

Shape letters: B images, G instances, P distinct (image, class) pairs, N those of one image, C channels, L prototypes, V
cells inside the boxes, S cells of a strip, H W mask grid, X a few of the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.mask_generation.box_cells import BoxCells
from sim_hf.mask_generation.prototype_bank import PrototypeBank
from sim_hf.structures import InstanceTargets

_CHANNELS_AT_A_TIME = 8
_CELLS_AT_A_TIME = 8192


@torch.no_grad()
def semantic_probability_map(
    features_BCHW: Tensor, bank: PrototypeBank, targets: InstanceTargets, *, temperature: float = 0.1
) -> Tensor:
    """M_S = sigmoid(max_l cos(z_i, p_l) / tau) for the class of every instance. -> (G, H, W) float32

    0.5 everywhere for a class without prototypes (see `bank.is_ready_K`). Made once per class and image, then shared by the
    instances of that class.
    """
    return ClassSimilarity(features_BCHW, bank, targets, temperature=temperature).probability_maps()


class ClassSimilarity:
    """What the semantic maps of a batch are read from: one map for each class of an image, however many its instances.

    similarity_PHW: cosine of every cell with the nearest prototype of the class; with `background`, minus that with the nearest
    prototype of what surrounds the class. pair_of_instance_G: the map of an instance.

    background (not in the paper): the second half of the bank's classes are the backgrounds of the first. All features of a
    network tend to point the same way, so the cosine alone is above 0 nearly everywhere and M_S fills the box; the difference
    has its 0 between figure and ground. A class whose background has no prototypes yet stays with the cosine.
    """

    @torch.no_grad()
    def __init__(
        self,
        features_BCHW: Tensor,
        bank: PrototypeBank,
        targets: InstanceTargets,
        *,
        temperature: float = 0.1,
        background: bool = False,
    ) -> None:
        if features_BCHW.dim() != 4 or features_BCHW.shape[1] != bank.feature_dim:
            raise ValueError(f"features must be (B, {bank.feature_dim}, H, W), got {tuple(features_BCHW.shape)}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        pairs_G = targets.image_ids_G * bank.num_classes + targets.class_labels_G
        pairs_P, self.pair_of_instance_G = pairs_G.unique(return_inverse=True)
        images, counts = (pairs_P // bank.num_classes).unique_consecutive(return_counts=True)
        classes_P = pairs_P % bank.num_classes
        self.similarity_PHW = torch.zeros(len(pairs_P), *features_BCHW.shape[-2:], device=features_BCHW.device)
        parts = zip(images.tolist(), *(rows.split(counts.tolist()) for rows in (classes_P, self.similarity_PHW)), strict=True)
        for image, classes_N, similarity_NHW in parts:
            _similarity_to_nearest(features_BCHW[image], bank.prototypes_KLC[classes_N], similarity_NHW)
            if background:
                ground_NHW = torch.zeros_like(similarity_NHW)
                ground_NLC = bank.prototypes_KLC[classes_N + bank.num_classes // 2]
                _similarity_to_nearest(features_BCHW[image], ground_NLC, ground_NHW)
                similarity_NHW -= ground_NHW

    def probability_maps(self) -> Tensor:
        """M_S everywhere. -> (G, H, W)"""
        return (self.similarity_PHW / self.temperature).sigmoid_()[self.pair_of_instance_G]

    def probabilities(self, cells: BoxCells, instances: slice) -> Tensor:
        """M_S at the cells inside the boxes of these instances. -> (V,)"""
        similarity_V = cells.pick(self.similarity_PHW, self.pair_of_instance_G[instances])
        return similarity_V.div_(self.temperature).sigmoid_()


def _similarity_to_nearest(features_CHW: Tensor, prototypes_NLC: Tensor, similarity_NHW: Tensor) -> None:
    """Cosine of every pixel of one image with the nearest prototype of each of its classes, into `similarity_NHW`.

    On a CPU strip by strip: the products with all prototypes, ten times the result, never exist at once and stay in the cache.
    For a GPU many small calls take longer.
    """
    step = _CELLS_AT_A_TIME if features_CHW.device.type == "cpu" else features_CHW[0].numel()
    strips = (maps.flatten(1).split(step, 1) for maps in (features_CHW, similarity_NHW))
    with torch.autocast(device_type=features_CHW.device.type, enabled=False):
        for features_CS, similarity_NS in zip(*strips, strict=True):
            features_CS = features_CS.float()
            products_NLS = (prototypes_NLC.flatten(0, 1) @ features_CS).unflatten(0, prototypes_NLC.shape[:2])
            # The length is positive and common to all prototypes: dividing after the maximum saves a copy of the features.
            length_S = _length(features_CS).clamp_(min=torch.finfo(torch.float32).tiny)
            torch.div(products_NLS.amax(1), length_S, out=similarity_NS)


def _length(features_CS: Tensor) -> Tensor:
    """Length of every pixel's feature vector, on a CPU a few channels at a time: no copy of the features. -> (S,)"""
    if features_CS.device.type != "cpu":
        return torch.linalg.vector_norm(features_CS, dim=0)
    squares_XS = torch.zeros_like(features_CS[:_CHANNELS_AT_A_TIME])
    for part_XS in features_CS.split(_CHANNELS_AT_A_TIME):
        squares_XS[: len(part_XS)].addcmul_(part_XS, part_XS)
    return squares_XS.sum(0).sqrt_()
