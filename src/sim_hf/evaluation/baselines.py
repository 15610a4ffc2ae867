"""Do the masks follow the objects? The same detections with their boxes filled in as masks, and how full the boxes are."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sim_hf.evaluation.coco_evaluator import CocoEvaluator
from sim_hf.evaluation.coco_results import from_coco_results

SURE = 0.3  # detections that a person would be shown


def filled_box_metrics(evaluator: CocoEvaluator) -> dict[str, float | None]:
    """Mask numbers of the evaluated detections if each mask were its own box filled in: the baseline that masks must beat."""
    category_ids = sorted(category["id"] for category in evaluator.ground_truth["categories"])
    filled = CocoEvaluator(evaluator.ground_truth, category_ids, only_seen=evaluator.only_seen)
    for image_id, result in from_coco_results(evaluator.coco_results(), category_ids).items():
        filled.update(image_id, {**result, "rles": [_filled(rle) for rle in result["rles"]]})
    filled.assume_complete()
    return {key: value for key, value in filled.compute().items() if key.startswith("segm/")}


def mean_fills(evaluator: CocoEvaluator) -> tuple[float | None, float | None]:
    """Mean of mask area / area of the mask's own box: of the sure predictions, and of the real masks (None without any)."""
    predicted = [
        _fill(result["segmentation"])
        for result in evaluator.coco_results()
        if result["score"] >= SURE and "segmentation" in result
    ]
    real: list[float] = []
    if evaluator.ground_truth["has_masks"]:
        annotations = evaluator.ground_truth["annotations"]
        real = [_fill(a["segmentation"]) for a in annotations if not a.get("iscrowd") and a.get("segmentation")]
    return (float(np.mean(predicted)) if predicted else None), (float(np.mean(real)) if real else None)


# `rle: Any`: pycocotools types run lengths by a class of its stubs that a program cannot name.


def _filled(rle: Any) -> Any:
    height, width = rle["size"]
    box = np.asarray(coco_mask.toBbox(rle), dtype=np.float64).reshape(1, 4)
    return coco_mask.frPyObjects(box, height, width)[0]  # pyright: ignore[reportCallIssue, reportArgumentType]  # takes boxes too


def _fill(rle: Any) -> float:
    _, _, w, h = coco_mask.toBbox(rle).tolist()
    return float(coco_mask.area(rle)) / max(w * h, 1.0)
