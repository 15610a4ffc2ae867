"""COCO's evaluation: by numpy for all images at once, or by pycocotools, the reference, image by image.

Both give the same arrays: tests hold the fast one to that. Shape letters: T IoU thresholds, R recall levels, K categories, A
area ranges, M detection limits.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from sim_hf.evaluation.coco_curves import accumulate
from sim_hf.evaluation.coco_matching import Instances, IouType, match

Backend = Literal["numpy", "pycocotools"]


def precision_and_recall(
    ground_truth: Mapping[str, Any],
    predictions: Instances,
    iou_type: IouType,
    *,
    image_ids: Sequence[int],
    max_detections: Sequence[int],
    backend: Backend = "numpy",
) -> tuple[np.ndarray, np.ndarray]:
    """-> precision (T, R, K, A, M) and recall (T, K, A, M), -1 where there is nothing to find.

    ground_truth: images, categories and annotations of a COCO file, ids from 1. max_detections: rising.
    """
    if backend == "pycocotools":
        return _by_pycocotools(ground_truth, predictions, iou_type, image_ids, max_detections)
    category_ids = [category["id"] for category in ground_truth["categories"]]
    matches = match(
        predictions,
        _objects(ground_truth["annotations"], iou_type),
        iou_type,
        image_ids=image_ids,
        category_ids=category_ids,
        max_detections=max_detections[-1],
    )
    return accumulate(matches, len(category_ids), max_detections)


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


def _objects(annotations: Sequence[Mapping[str, Any]], iou_type: IouType) -> Instances:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([annotation[name] for annotation in annotations], dtype)

    segmentations = [annotation["segmentation"] for annotation in annotations] if iou_type == "segm" else None
    return Instances(
        image_ids_N=column("image_id", np.int64),
        category_ids_N=column("category_id", np.int64),
        boxes_N4=column("bbox", np.float64).reshape(-1, 4),
        areas_N=column("area", np.float64),
        crowd_N=column("iscrowd", np.bool_),
        scores_N=np.zeros(len(annotations)),
        sizes=segmentations and [segmentation["size"] for segmentation in segmentations],
        counts=segmentations and [segmentation["counts"] for segmentation in segmentations],
    )


def _by_pycocotools(
    ground_truth: Mapping[str, Any],
    predictions: Instances,
    iou_type: IouType,
    image_ids: Sequence[int],
    max_detections: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(annotations: list[dict[str, Any]]) -> Any:
        coco: Any = COCO()
        coco.dataset = {
            "images": ground_truth["images"],
            "categories": ground_truth["categories"],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()), collector_paused():  # it prints its progress
        real = index([dict(annotation) for annotation in ground_truth["annotations"]])  # it writes into them
        evaluation = COCOeval(real, index(_as_annotations(predictions, iou_type)), iou_type)
        evaluation.params.imgIds = list(image_ids)  # an empty list would mean all
        evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _as_annotations(predictions: Instances, iou_type: IouType) -> list[dict[str, Any]]:
    """As pycocotools has them after loading: loadRes itself would take the area from the box, as soon as there is one."""
    annotations = [
        {"id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "score": score, "iscrowd": 0}
        for number, (image_id, category_id, box, area, score) in enumerate(
            zip(
                predictions.image_ids_N.tolist(),
                predictions.category_ids_N.tolist(),
                predictions.boxes_N4.tolist(),
                predictions.areas_N.tolist(),
                predictions.scores_N.tolist(),
                strict=True,
            ),
            start=1,
        )
    ]
    if iou_type == "segm":
        for annotation, rle in zip(annotations, predictions.run_lengths(np.arange(len(predictions))), strict=True):
            annotation["segmentation"] = rle
    return annotations
