"""Semantic-aware instance mask generation: the paper's five parts in their order (SIM, Sec. 3.2 to 3.4).

Shape letters: B images, G instances, N positives, R positives of one instance, V cells inside the boxes, M prototype pixels,
C channels, H W mask grid.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sim_hf.mask_generation.box_cells import BoxCells, box_cells
from sim_hf.mask_generation.pixel_competition import PixelCompetition
from sim_hf.mask_generation.positive_mask_weighting import (
    instance_probabilities,
    positive_mask_weights,
    positives_by_instance,
    predicted_boxes,
)
from sim_hf.mask_generation.prototype_bank import PrototypeBank
from sim_hf.mask_generation.self_correction import correct_cells, masks_outside_of_boxes
from sim_hf.mask_generation.semantic_map import ClassSimilarity
from sim_hf.mask_generation.small_objects import ellipse_shares, mark_small_objects
from sim_hf.structures import InstanceTargets, MaskPredictions, PseudoMasks, box_iou_pairwise


class PseudoMaskGenerator:
    """Makes the pseudo masks of a batch from the teacher's predictions and mask features.

    Arguments: `alpha`, `high_range`, `low`, `confident` see `self_correction`; `temperature` is tau of Eq. 1, `mu` that of Eq.
    6. Pixels inside the box with M_I above `confident` feed the prototypes, at most `max_pixels_per_instance` of an instance.
    `background_prototypes` (not in the paper): the second half of the bank's classes are the backgrounds of the first; they
    learn from pixels inside the box with M_I below `background` that no instance claims, and M_S says how much more a pixel
    looks like its class than like those (see `ClassSimilarity`). `pixel_competition`: instances whose boxes overlap share the
    pixels there (see there; not in the paper). `chunk_size` instances are worked on at a time; it bounds memory and changes
    nothing else. `min_iou`: predictions whose box meets the given one with less take no part in M_I (BoxTeacher's gate; not in
    the paper). `small_ellipses`: objects of few cells lean on the ellipse in their box (`small_objects`; not in the paper). Both
    maps are made inside the boxes only: outside, the box decides.
    """

    def __init__(
        self,
        bank: PrototypeBank,
        *,
        alpha: float = 0.5,
        temperature: float = 0.1,
        mu: float = 5.0,
        min_iou: float = 0.0,
        confident: float = 0.7,
        high_range: tuple[float, float] = (0.7, 0.8),
        low: float = 0.4,
        background: float = 0.2,
        max_pixels_per_instance: int = 256,
        background_prototypes: bool = False,
        pixel_competition: bool = False,
        small_ellipses: bool = False,
        chunk_size: int = 16,
    ) -> None:
        if min(max_pixels_per_instance, chunk_size) < 1:
            raise ValueError(
                f"max_pixels_per_instance and chunk_size must be at least 1, got {max_pixels_per_instance} and {chunk_size}"
            )
        if background_prototypes and bank.num_classes % 2:
            raise ValueError(f"a bank with backgrounds has two classes for each of the data, got {bank.num_classes}")
        self.bank = bank
        self.alpha = alpha
        self.temperature = temperature
        self.mu = mu
        self.min_iou = min_iou
        self.confident = confident
        self.high_range = high_range
        self.low = low
        self.background = background
        self.background_prototypes = background_prototypes
        self.max_pixels_per_instance = max_pixels_per_instance
        self.pixel_competition = pixel_competition
        self.small_ellipses = small_ellipses
        self.chunk_size = chunk_size

    @torch.no_grad()
    def __call__(self, teacher: MaskPredictions, targets: InstanceTargets, *, update_prototypes: bool = True) -> PseudoMasks:
        """Pseudo masks on the mask grid. With `update_prototypes` the bank also collects this batch's confident pixels;
        they count from the bank's next `commit` on."""
        height, width = teacher.mask_logits_NHW.shape[-2:]
        _check_grids((height, width), tuple(teacher.mask_features_BCHW.shape[-2:]))
        stride = targets.input_size[0] / height
        # Positive mask weighting (Eq. 6): the weights.
        teacher, boxes_N4 = self._good_enough(teacher, targets, stride)
        weights_N = positive_mask_weights(boxes_N4, targets.boxes_G4, teacher.instance_ids_N, mu=self.mu)
        rows_GR = positives_by_instance(teacher.instance_ids_N, len(targets))
        # Semantic probability map (Eq. 1): what it is read from, once for all chunks.
        options = {"temperature": self.temperature, "background": self.background_prototypes}
        similarity = ClassSimilarity(teacher.mask_features_BCHW, self.bank, targets, **options)
        alpha_G = torch.where(self.bank.is_ready_K[targets.class_labels_G], self.alpha, 1.0)
        has_positives_G = teacher.instance_ids_N.bincount(minlength=len(targets)) > 0
        masks = masks_outside_of_boxes(has_positives_G, (height, width))
        if self.small_ellipses:
            mark_small_objects(masks, targets.boxes_G4, stride)
        parts = [slice(start, start + self.chunk_size) for start in range(0, len(targets), self.chunk_size)]

        @lru_cache(maxsize=1)  # asked twice by a competition: a batch of one part makes them once
        def of_part(start: int) -> tuple[BoxCells, Tensor]:
            """The cells of the instances of a part, and M_I (Eq. 6) there."""
            part = slice(start, start + self.chunk_size)
            cells = box_cells(targets.boxes_G4[part], height, width, stride)
            return cells, instance_probabilities(teacher.mask_logits_NHW, rows_GR[part], weights_N, cells)

        grids = (targets.num_images, (height, width), stride, alpha_G.device)
        competition = PixelCompetition(*grids) if self.pixel_competition else None
        if competition is not None:
            for part in parts:
                competition.enter(*of_part(part.start), targets.boxes_G4[part], targets.image_ids_G[part])
        for part in parts:
            labels_G, image_ids_G = targets.class_labels_G[part], targets.image_ids_G[part]
            cells, instance_V = of_part(part.start)
            semantic_V = similarity.probabilities(cells, part)
            confident_V = instance_V > self.confident
            # An instance that is seen nowhere says nothing about its surroundings.
            ground_V = (instance_V < self.background) & cells.spread(cells.total(confident_V) > 0)
            if competition is not None:
                share_V = competition.shares(cells, instance_V, targets.boxes_G4[part], image_ids_G)
                semantic_V, instance_V = semantic_V * share_V, instance_V * share_V
                ground_V &= ~competition.claimed(cells, image_ids_G, self.background)
            # Prototypes and their optimal-transport assignment: `bank.commit`, once per optimiser step.
            if update_prototypes:
                wanted = (instance_V > self.confident, ground_V)
                self.observe(wanted, cells, teacher.mask_features_BCHW, image_ids_G, labels_G)
            # Self-correction (Eq. 7).
            limits = {"confident": self.confident, "high_range": self.high_range, "low": self.low}
            correct_cells(
                semantic_V,
                instance_V,
                cells,
                _instances(masks, part),
                alpha_G=alpha_G[part],
                has_positives_G=has_positives_G[part],
                **limits,
                ellipse_V=ellipse_shares(targets.boxes_G4[part], cells, stride) if self.small_ellipses else None,
            )
        return masks

    def _good_enough(self, teacher: MaskPredictions, targets: InstanceTargets, stride: float) -> tuple[MaskPredictions, Tensor]:
        """The predictions that pass the gate, and their boxes."""
        boxes_N4 = predicted_boxes(teacher.mask_logits_NHW, stride) if teacher.boxes_N4 is None else teacher.boxes_N4
        if self.min_iou <= 0:
            return teacher, boxes_N4
        good_N = box_iou_pairwise(boxes_N4, targets.boxes_G4[teacher.instance_ids_N]) >= self.min_iou
        return teacher.select(good_N), boxes_N4[good_N]

    def observe(
        self, wanted: tuple[Tensor, Tensor], cells: BoxCells, features_BCHW: Tensor, image_ids_G: Tensor, labels_G: Tensor
    ) -> None:
        """Give the bank the pixels of figure and, where it has backgrounds, of ground (two masks of the cells)."""
        figure_V, ground_V = wanted
        self.observe_pixels(figure_V, cells, features_BCHW, image_ids_G, labels_G)
        if self.background_prototypes:
            self.observe_pixels(ground_V, cells, features_BCHW, image_ids_G, labels_G + self.bank.num_classes // 2)

    def observe_pixels(
        self, wanted_V: Tensor, cells: BoxCells, features_BCHW: Tensor, image_ids_G: Tensor, class_labels_G: Tensor
    ) -> None:
        """Give the bank the wanted pixels of these classes, at most `max_pixels_per_instance` of each instance."""
        wanted = wanted_V.nonzero()[:, 0]
        instances_M = cells.instances_V.index_select(0, wanted)
        chosen = evenly_spaced(instances_M, cells.num_instances, self.max_pixels_per_instance)
        instances_M, cells_M = instances_M[chosen], cells.cells_V[wanted[chosen]]
        pixels_MC = features_BCHW.flatten(2)[image_ids_G[instances_M], :, cells_M]
        self.bank.observe(pixels_MC, class_labels_G[instances_M])

    @torch.no_grad()
    def diagnostics(self, pseudo_masks: PseudoMasks, targets: InstanceTargets) -> dict[str, Tensor]:
        """Is it working? Scalars: share of the boxes' pixels that are trusted, share of classes with prototypes, mean cosine
        between the prototypes of a class (1 = collapsed), entropy of their use (1 = even). Backgrounds are classes here."""
        height, width = pseudo_masks.trusted_GHW.shape[-2:]
        trusted_V = box_cells(targets.boxes_G4, height, width, targets.input_size[0] / height).pick(pseudo_masks.trusted_GHW)
        trusted_share = trusted_V.sum() / max(len(trusted_V), 1)
        return {
            "pseudo_trusted_share": trusted_share,
            "prototype_ready_share": self.bank.is_ready_K.float().mean(),
            "prototype_diversity": self.bank.diversity(),
            "prototype_usage_entropy": self.bank.usage_entropy(),
        }


def _check_grids(of_masks: tuple[int, int], of_features: tuple[int, ...]) -> None:
    if of_masks != of_features:
        raise ValueError(f"masks and mask features must share a grid, got {of_masks} and {of_features}")


def evenly_spaced(instances_V: Tensor, num_instances: int, max_pixels: int) -> Tensor:
    """At most `max_pixels` pixels of every instance, evenly spaced in their order. -> index (M,) int64

    instances_V: the instance of each pixel, in order. A choice by each instance alone, so the rest of the batch does not
    change it.
    """
    sizes_G = instances_V.bincount(minlength=num_instances)
    rank_V = torch.arange(len(instances_V), device=instances_V.device) - (sizes_G.cumsum(0) - sizes_G)[instances_V]
    size_V, kept_V = sizes_G[instances_V], sizes_G.clamp(max=max_pixels)[instances_V]
    # Pixel r of n is kept where r * k / n steps to the next integer: exactly k of them.
    return ((rank_V + 1) * kept_V // size_V > rank_V * kept_V // size_V).nonzero()[:, 0]


def _instances(masks: PseudoMasks, part: slice) -> PseudoMasks:
    """Views of the masks of these instances."""
    return PseudoMasks(
        masks.probabilities_GHW[part],
        masks.target_GHW[part],
        masks.trusted_GHW[part],
        masks.scores_G[part],
        masks.smallness_G[part],
    )
