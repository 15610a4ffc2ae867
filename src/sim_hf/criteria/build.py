"""The one place where a supervision is chosen. Config objects stop here: criteria take plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from sim_hf.criteria.base import MaskCriterion
from sim_hf.criteria.bbtp import BBTPCriterion
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.dense_criterion import DenseCriterion
from sim_hf.criteria.fully_supervised import FullySupervisedCriterion
from sim_hf.criteria.level_set import LevelSetCriterion
from sim_hf.criteria.matcher import HungarianMatcher
from sim_hf.criteria.matching_costs import MatchingBy, box_matching_cost, projection_matching_cost
from sim_hf.criteria.set_criterion import SetCriterion
from sim_hf.criteria.sim import SIMCriterion
from sim_hf.mask_generation import PrototypeBank, PseudoMaskGenerator


def build_full(*, supervision, num_classes: int, feature_dim: int, steps: Callable[[float], int]) -> FullySupervisedCriterion:
    return FullySupervisedCriterion(mask_weight=supervision.mask_weight, dice_weight=supervision.dice_weight)


def build_boxinst(*, supervision, num_classes: int, feature_dim: int, steps: Callable[[float], int]) -> BoxInstCriterion:
    return BoxInstCriterion(
        projection_weight=supervision.projection_weight,
        pairwise_weight=supervision.pairwise_weight,
        pairwise_warmup_steps=steps(supervision.pairwise_warmup),
        color_threshold=supervision.color_threshold,
        dilation=supervision.pairwise_dilation,
        mask_weight=supervision.mask_weight,
        dice_weight=supervision.dice_weight,
        exact_box_edges=supervision.exact_box_edges,
    )


def build_level_set(*, supervision, num_classes: int, feature_dim: int, steps: Callable[[float], int]) -> LevelSetCriterion:
    return LevelSetCriterion(
        projection_weight=supervision.projection_weight,
        image_weight=supervision.level_set_image_weight,
        feature_weight=supervision.level_set_feature_weight,
        consistency_weight=supervision.consistency_weight,
        consistency_iterations=supervision.consistency_iterations,
        dilation=supervision.pairwise_dilation,
        mask_weight=supervision.mask_weight,
        dice_weight=supervision.dice_weight,
        exact_box_edges=supervision.exact_box_edges,
    )


def build_bbtp(*, supervision, num_classes: int, feature_dim: int, steps: Callable[[float], int]) -> BBTPCriterion:
    return BBTPCriterion(
        tightness_weight=supervision.tightness_weight,
        smoothness_weight=supervision.smoothness_weight,
        mask_weight=supervision.mask_weight,
        dice_weight=supervision.dice_weight,
    )


def build_sim(*, supervision, num_classes: int, feature_dim: int, steps: Callable[[float], int]) -> SIMCriterion:
    bank = PrototypeBank(
        num_classes * (2 if supervision.background_prototypes else 1),
        supervision.num_prototypes,
        feature_dim,
        momentum=supervision.prototype_momentum,
        hard_assignment=supervision.hard_assignment,
        balanced=supervision.balanced_assignment,
    )
    generator = PseudoMaskGenerator(
        bank,
        alpha=supervision.alpha,
        temperature=supervision.temperature,
        mu=supervision.mu,
        min_iou=supervision.pseudo_min_iou,
        background_prototypes=supervision.background_prototypes,
        pixel_competition=supervision.pixel_competition,
        small_ellipses=supervision.small_ellipses,
    )
    sizes: dict[str, Any] = {"num_classes": num_classes, "feature_dim": feature_dim, "steps": steps}
    has_level_set = supervision.level_set_weight > 0
    start = steps(supervision.pseudo_start)
    return SIMCriterion(
        build_boxinst(supervision=supervision, **sizes),
        generator,
        level_set=build_level_set(supervision=supervision, **sizes) if has_level_set else None,
        level_set_weight=supervision.level_set_weight,
        pseudo_weight=supervision.pseudo_weight,
        pseudo_quality_weight=supervision.pseudo_quality_weight,
        small_weight=supervision.mask_weight,
        paste_weight=supervision.paste_weight,
        pseudo_start_step=start,
        pseudo_ramp_steps=steps(supervision.pseudo_ramp),
        prototype_start_step=start // 2,  # masks of the first half of the warm-up are no use as prototypes
    )


MASK_CRITERIA: dict[str, Callable[..., Any]] = {
    "full": build_full,
    "boxinst": build_boxinst,
    "level_set": build_level_set,
    "bbtp": build_bbtp,
    "sim": build_sim,
}

# "own": the supervision's own cost (masks for `full`, projections for all others)
MATCHING_COSTS = {"own": None, "projections": projection_matching_cost, "boxes": box_matching_cost}

DetectionCriterion = SetCriterion | DenseCriterion


def build_set(mask_criterion: MaskCriterion, *, supervision, model_config) -> SetCriterion:
    """model_config: gives num_queries."""
    criterion = SetCriterion(
        mask_criterion,
        num_queries=model_config.num_queries,
        class_weight=supervision.class_weight,
        no_object_weight=supervision.no_object_weight,
        class_cost=supervision.class_cost,
        mask_cost=supervision.mask_cost,
        positives=supervision.positives,
    )
    cost = MATCHING_COSTS[supervision.matching]
    if cost is projection_matching_cost:
        cost = partial(cost, exact_box_edges=supervision.exact_box_edges)
    if cost is not None:
        stand_in = cast(MaskCriterion, MatchingBy(cost))  # the matcher asks for the cost only
        criterion.matcher = HungarianMatcher(stand_in, class_cost=supervision.class_cost, mask_cost=supervision.mask_cost)
    return criterion


def build_dense(mask_criterion: MaskCriterion, *, supervision, model_config) -> DenseCriterion:
    """model_config: gives sizes_of_interest. Nothing is matched, and FCOS's three losses have its weights."""
    return DenseCriterion(mask_criterion, sizes_of_interest=model_config.sizes_of_interest[:-1])


# by the model_type of the architecture
DETECTION_CRITERIA: dict[str, Callable[..., DetectionCriterion]] = {"sim": build_set, "condinst": build_dense}


def build_criterion(supervision, model_config, *, steps: Callable[[float], int]) -> DetectionCriterion:
    """Detection side of the architecture + mask side of the supervision.

    supervision: `SupervisionArguments` (or anything with its fields). model_config: gives model_type, num_labels,
    mask_feature_size and what the architecture's detection side needs. steps: turns a length of the schedule (steps or fraction)
    into steps.
    """
    mask_criterion = MASK_CRITERIA[supervision.supervision](
        supervision=supervision,
        num_classes=model_config.num_labels,
        feature_dim=model_config.mask_feature_size,
        steps=steps,
    )
    build_detection = DETECTION_CRITERIA[model_config.model_type]
    return build_detection(mask_criterion, supervision=supervision, model_config=model_config)
