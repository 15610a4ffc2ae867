"""Semantic-aware instance mask generation: the paper's five parts in their order (SIM, Sec. 3.2 to 3.4).

Shape letters: B images, G instances, N positives, M prototype pixels, V confident pixels, C channels, H W mask grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.mask_generation.positive_mask_weighting import (
    instance_probability_map,
    positive_mask_weights,
    predicted_boxes,
)
from sim_hf.mask_generation.prototype_bank import PrototypeBank
from sim_hf.mask_generation.self_correction import self_correction
from sim_hf.mask_generation.semantic_map import semantic_probability_map
from sim_hf.structures import InstanceTargets, MaskPredictions, PseudoMasks, box_masks


class PseudoMaskGenerator:
    """Makes the pseudo masks of a batch from the teacher's predictions and mask features.

    Arguments: `alpha`, `high_range`, `low`, `confident` see `self_correction`; `temperature` is tau of Eq. 1, `mu` that of
    Eq. 6. Pixels inside the box with M_I above `confident` feed the prototypes, at most `max_pixels_per_instance` of an
    instance. `chunk_size` instances are worked on at a time; it bounds memory and changes nothing else.
    """

    def __init__(
        self,
        bank: PrototypeBank,
        *,
        alpha: float = 0.5,
        temperature: float = 0.1,
        mu: float = 5.0,
        confident: float = 0.7,
        high_range: tuple[float, float] = (0.7, 0.8),
        low: float = 0.4,
        max_pixels_per_instance: int = 256,
        chunk_size: int = 16,
    ) -> None:
        if min(max_pixels_per_instance, chunk_size) < 1:
            raise ValueError(
                f"max_pixels_per_instance and chunk_size must be at least 1, got {max_pixels_per_instance} and {chunk_size}"
            )
        self.bank = bank
        self.alpha = alpha
        self.temperature = temperature
        self.mu = mu
        self.confident = confident
        self.high_range = high_range
        self.low = low
        self.max_pixels_per_instance = max_pixels_per_instance
        self.chunk_size = chunk_size

    @torch.no_grad()
    def __call__(self, teacher: MaskPredictions, targets: InstanceTargets, *, update_prototypes: bool = True) -> PseudoMasks:
        """Pseudo masks on the mask grid. With `update_prototypes` the bank also collects this batch's confident pixels;
        they count from the bank's next `commit` on."""
        height, width = teacher.mask_logits_NHW.shape[-2:]
        if teacher.mask_features_BCHW.shape[-2:] != (height, width):
            raise ValueError(
                f"masks and mask features must share a grid, got {(height, width)} and "
                f"{tuple(teacher.mask_features_BCHW.shape[-2:])}"
            )
        chunks = [
            self._generate(*_select_instances(teacher, targets, start, start + self.chunk_size), update_prototypes)
            for start in range(0, max(len(targets), 1), self.chunk_size)
        ]
        if len(chunks) == 1:
            return chunks[0]
        return PseudoMasks(
            probabilities_GHW=torch.cat([chunk.probabilities_GHW for chunk in chunks]),
            target_GHW=torch.cat([chunk.target_GHW for chunk in chunks]),
            trusted_GHW=torch.cat([chunk.trusted_GHW for chunk in chunks]),
            scores_G=torch.cat([chunk.scores_G for chunk in chunks]),
        )

    def _generate(self, teacher: MaskPredictions, targets: InstanceTargets, update_prototypes: bool) -> PseudoMasks:
        stride = targets.input_size[0] / teacher.mask_logits_NHW.shape[-2]
        # 1. Positive mask weighting (Eq. 6). First, because the prototypes learn from its confident pixels.
        weights_N = positive_mask_weights(
            predicted_boxes(teacher.mask_logits_NHW, stride), targets.boxes_G4, teacher.instance_ids_N, mu=self.mu
        )
        instance_GHW = instance_probability_map(teacher.mask_logits_NHW, weights_N, teacher.instance_ids_N, len(targets))
        # 2. and 3. Prototypes and their optimal-transport assignment: `bank.commit`, once per optimiser step.
        if update_prototypes:
            self._observe_confident_pixels(instance_GHW, teacher.mask_features_BCHW, targets, stride)
        # 4. Semantic probability map (Eq. 1).
        semantic_GHW = semantic_probability_map(teacher.mask_features_BCHW, self.bank, targets, temperature=self.temperature)
        # 5. Self-correction (Eq. 7).
        return self_correction(
            semantic_GHW,
            instance_GHW,
            targets.boxes_G4,
            stride=stride,
            alpha=self.alpha,
            confident=self.confident,
            high_range=self.high_range,
            low=self.low,
            semantic_ready_G=self.bank.is_ready_K[targets.class_labels_G],
            has_positives_G=teacher.instance_ids_N.bincount(minlength=len(targets)) > 0,
        )

    def _observe_confident_pixels(
        self, instance_GHW: Tensor, features_BCHW: Tensor, targets: InstanceTargets, stride: float
    ) -> None:
        height, width = instance_GHW.shape[-2:]
        confident_GHW = (instance_GHW > self.confident) & box_masks(targets.boxes_G4, height, width, stride)
        instances_M, rows_M, columns_M = evenly_spaced_pixels(confident_GHW, self.max_pixels_per_instance)
        pixels_MC = features_BCHW[targets.image_ids_G[instances_M], :, rows_M, columns_M]
        self.bank.observe(pixels_MC, targets.class_labels_G[instances_M])

    @torch.no_grad()
    def diagnostics(self, pseudo_masks: PseudoMasks, targets: InstanceTargets) -> dict[str, Tensor]:
        """Is it working? Scalars: share of the boxes' pixels that are trusted, share of classes with prototypes, mean
        cosine between the prototypes of a class (1 = collapsed), entropy of their use (1 = even)."""
        height, width = pseudo_masks.trusted_GHW.shape[-2:]
        inside_GHW = box_masks(targets.boxes_G4, height, width, targets.input_size[0] / height)
        trusted_share = (pseudo_masks.trusted_GHW & inside_GHW).sum() / inside_GHW.sum().clamp(min=1)
        return {
            "pseudo_trusted_share": trusted_share,
            "prototype_ready_share": self.bank.is_ready_K.float().mean(),
            "prototype_diversity": self.bank.diversity(),
            "prototype_usage_entropy": self.bank.usage_entropy(),
        }


@torch.no_grad()
def evenly_spaced_pixels(mask_GHW: Tensor, max_pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most `max_pixels` pixels of every mask, evenly spaced in reading order. -> instance, row, column: (M,) int64 each

    A choice by each instance alone, so the rest of the batch does not change it.
    """
    instances_V, rows_V, columns_V = mask_GHW.nonzero(as_tuple=True)
    sizes_G = mask_GHW.sum((1, 2))
    rank_V = torch.arange(len(instances_V), device=mask_GHW.device) - (sizes_G.cumsum(0) - sizes_G)[instances_V]
    size_V, kept_V = sizes_G[instances_V], sizes_G.clamp(max=max_pixels)[instances_V]
    # Pixel r of n is kept where r * k / n steps to the next integer: exactly k of them.
    chosen_V = (rank_V + 1) * kept_V // size_V > rank_V * kept_V // size_V
    return instances_V[chosen_V], rows_V[chosen_V], columns_V[chosen_V]


def _select_instances(
    teacher: MaskPredictions, targets: InstanceTargets, start: int, stop: int
) -> tuple[MaskPredictions, InstanceTargets]:
    """The instances start..stop and their positives."""
    if start == 0 and stop >= len(targets):
        return teacher, targets
    stop = min(stop, len(targets))
    chosen_N = (teacher.instance_ids_N >= start) & (teacher.instance_ids_N < stop)
    predictions = MaskPredictions(
        mask_logits_NHW=teacher.mask_logits_NHW[chosen_N],
        instance_ids_N=teacher.instance_ids_N[chosen_N] - start,
        scores_N=teacher.scores_N[chosen_N],
        mask_features_BCHW=teacher.mask_features_BCHW,
    )
    return predictions, targets.select(torch.arange(start, stop, device=targets.boxes_G4.device))
