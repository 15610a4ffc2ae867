"""COCO's matching and accumulation: by faster-coco-eval (C++, Apache-2.0) where it is installed, else by pycocotools.

pycocotools is the reference; the other one gives the same arrays (to 1e-12: a test holds it to that) several times faster.
Shape letters: T IoU thresholds, R recall levels, K categories, A area ranges, M detection limits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

IouType = Literal["segm", "bbox"]
Backend = Literal["faster-coco-eval", "pycocotools"]


def default_backend() -> Backend:
    return "faster-coco-eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"


def precision_and_recall(
    ground_truth: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    *,
    image_ids: Sequence[int],
    max_detections: Sequence[int],
    backend: Backend | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """-> precision (T, R, K, A, M) and recall (T, K, A, M), -1 where there is nothing to find.

    ground_truth: images, categories and annotations of a COCO file. predictions: annotations with id, area, iscrowd and score.
    """
    if (backend or default_backend()) == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()), collector_paused():  # both print their progress
        real = _index(COCO(), ground_truth, ground_truth["annotations"])
        if iou_type == "segm":
            predictions = _without_needless_masks(predictions, ground_truth["annotations"])
        evaluation = COCOeval(real, _index(COCO(), ground_truth, predictions), iou_type)
        evaluation.params.imgIds = list(image_ids)  # an empty list would mean all
        evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python's collector of reference cycles goes through all objects again and again while hundreds of thousands of
    dictionaries are made; there are no cycles among these, and it would take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _without_needless_masks(
    predictions: Iterable[Mapping[str, Any]], annotations: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """A prediction in an image that has no object of its class is compared with nothing: only its area and score count, and
    the reading of its mask is saved."""
    present = {(annotation["image_id"], annotation["category_id"]) for annotation in annotations}
    return [
        prediction
        if (prediction["image_id"], prediction["category_id"]) in present
        else {**prediction, "segmentation": {"size": prediction["segmentation"]["size"], "counts": "0"}}
        for prediction in predictions
    ]


def _index(coco: Any, ground_truth: Mapping[str, Any], annotations: Iterable[Mapping[str, Any]]) -> Any:
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": [dict(annotation) for annotation in annotations],  # the evaluation writes into them
    }
    coco.createIndex()
    return coco
