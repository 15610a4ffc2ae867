"""The one place where a supervision is chosen. Config objects stop here: criteria take plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.fully_supervised import FullySupervisedCriterion
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
    )


def build_sim(*, supervision, num_classes: int, feature_dim: int, steps: Callable[[float], int]) -> SIMCriterion:
    bank = PrototypeBank(num_classes, supervision.num_prototypes, feature_dim, momentum=supervision.prototype_momentum)
    generator = PseudoMaskGenerator(bank, alpha=supervision.alpha, temperature=supervision.temperature, mu=supervision.mu)
    start = steps(supervision.pseudo_start)
    return SIMCriterion(
        build_boxinst(supervision=supervision, num_classes=num_classes, feature_dim=feature_dim, steps=steps),
        generator,
        pseudo_weight=supervision.pseudo_weight,
        paste_weight=supervision.paste_weight,
        pseudo_start_step=start,
        pseudo_ramp_steps=steps(supervision.pseudo_ramp),
        prototype_start_step=start // 2,  # masks of the first half of the warm-up are no use as prototypes
    )


MASK_CRITERIA: dict[str, Callable[..., Any]] = {"full": build_full, "boxinst": build_boxinst, "sim": build_sim}

DETECTION_CRITERIA: dict[str, type[SetCriterion]] = {"sim": SetCriterion}  # by the model_type of the architecture


def build_criterion(supervision, model_config, *, steps: Callable[[float], int]) -> SetCriterion:
    """Detection side of the architecture + mask side of the supervision.

    supervision: `SupervisionArguments` (or anything with its fields). model_config: gives model_type, num_labels,
    mask_feature_size and num_queries. steps: turns a length of the schedule (steps or fraction) into steps.
    """
    mask_criterion = MASK_CRITERIA[supervision.supervision](
        supervision=supervision,
        num_classes=model_config.num_labels,
        feature_dim=model_config.mask_feature_size,
        steps=steps,
    )
    return DETECTION_CRITERIA[model_config.model_type](
        mask_criterion,
        num_queries=model_config.num_queries,
        class_weight=supervision.class_weight,
        no_object_weight=supervision.no_object_weight,
        class_cost=supervision.class_cost,
        mask_cost=supervision.mask_cost,
    )
