"""COCO numbers of a model on a data set, at original resolution, whatever classes the two have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from sim_hf.data.category_ids import category_ids
from sim_hf.evaluation.coco_evaluator import CocoEvaluator
from sim_hf.evaluation.ground_truth import coco_ground_truth
from sim_hf.evaluation.prediction import names_of, predict_rows

logger = logging.getLogger(__name__)


def shared_labels(model_names: dict[int, str], rows, *, source_ids: list[int] | None = None) -> dict[int, int]:
    """Model label -> category id of the data set, for the classes that both name (letter case does not matter).

    Raises ValueError when they share none: every prediction would be wrong, and an AP of 0 would hide why.
    """
    names = rows.features["objects"]["category"].feature.names
    ids = category_ids(rows) if source_ids is None else source_ids
    by_name = {name.casefold(): category for name, category in zip(names, ids, strict=True)}
    shared = {int(label): by_name[name.casefold()] for label, name in sorted(model_names.items()) if name.casefold() in by_name}
    if not shared:
        raise ValueError(
            f"the model and the data set share no class name: model {sorted(model_names.values())[:8]}, data {sorted(names)[:8]}"
        )
    absent = sorted(set(by_name.values()) - set(shared.values()))
    if absent:
        logger.warning("%d of %d categories are unknown to the model and count as missed: %s", len(absent), len(by_name), absent)
    return shared


def evaluate_model(
    model: nn.Module,
    processor,
    rows,
    ground_truth=None,
    *,
    batch_size: int = 8,
    process_index: int = 0,
    num_processes: int = 1,
    limit: int | None = None,
    per_class: bool = False,
    progress: str | None = "evaluate",
    on_result: Callable | None = None,
) -> tuple[dict[str, float | None], CocoEvaluator]:
    """Evaluate on `rows` (a data set with `objects`) -> (metrics, evaluator). ground_truth: a COCO file or dict, or None to
    use the rows' own boxes. on_result(row, picture, result): called for each image of this process."""
    names = names_of(model)
    shared = shared_labels(names, rows)
    label_to_category = [shared.get(label, -1) for label in range(len(names))]
    evaluator = CocoEvaluator(
        coco_ground_truth(rows if ground_truth is None else ground_truth), label_to_category, only_seen=limit is not None
    )
    stream = predict_rows(
        model,
        processor,
        rows,
        batch_size=batch_size,
        allowed_labels=list(shared),
        process_index=process_index,
        num_processes=num_processes,
        limit=limit,
        progress=progress,
    )
    for row, picture, result in stream:
        evaluator.update(int(row["image_id"]), result)
        if on_result is not None:
            on_result(row, picture, result)
    evaluator.synchronize()
    return evaluator.compute(per_class=per_class), evaluator
