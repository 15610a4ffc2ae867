"""COCO mask AP and box AP of predictions, by COCO's own rules behind a door that lets nothing wrong in.

Shape letters: n predictions of an image, H W its rows and columns; T IoU thresholds, R recall levels, K categories,
A area ranges, M values of `max_detections`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed

from sim_hf.evaluation.coco_backend import Backend, collector_paused, precision_and_recall
from sim_hf.evaluation.coco_matching import IouType
from sim_hf.evaluation.coco_results import NO_CATEGORY, ImagePredictions, joined
from sim_hf.evaluation.ground_truth import as_id, coco_ground_truth

AREAS = ("all", "small", "medium", "large")  # pycocotools' order
IOU_TYPES: tuple[IouType, ...] = ("segm", "bbox")


class CocoEvaluator:
    """Collects predictions image by image and gives COCO's numbers.

    ground_truth: anything `coco_ground_truth` takes. category_ids: label -> original category id
    (NO_CATEGORY: the data set has none for it). max_detections: AP and the
    AR of the area ranges are at the last. only_seen: evaluate the images that were given to `update`, instead of all.
    backend: "pycocotools" has the numbers computed by the reference, which are the same, in many times the time.

    Every category of the ground truth counts, as in COCO's own evaluation: one the model cannot predict has AP 0. Box AP is
    that of the predicted masks' own boxes, where there are masks.

    Examples:
        >>> square = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [0, 0, 4, 4], "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
        >>> coco = {"images": [{"id": 5, "height": 8, "width": 8}], "categories": [{"id": 3, "name": "tile"}]}
        >>> evaluator = CocoEvaluator({**coco, "annotations": [square]}, category_ids=[3])  # label 0 is category 3
        >>> masks = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> masks[0, :4, :4] = True
        >>> evaluator.update(5, {"scores": torch.tensor([0.9]), "labels": torch.tensor([0]), "masks": masks})
        >>> round(evaluator.compute()["segm/AP"], 3)
        1.0
    """

    def __init__(
        self,
        ground_truth: Any,
        category_ids: Sequence[int],
        *,
        max_detections: Sequence[int] = (1, 10, 100),
        only_seen: bool = False,
        backend: Backend = "numpy",
    ) -> None:
        is_clean = isinstance(ground_truth, Mapping) and "has_masks" in ground_truth
        self.ground_truth = ground_truth if is_clean else coco_ground_truth(ground_truth)
        self.category_ids = _checked_category_ids(category_ids, self.ground_truth["categories"])
        self.max_detections = sorted({int(count) for count in max_detections})
        if not self.max_detections or self.max_detections[0] < 1:
            raise ValueError(f"max_detections must be positive counts, got {tuple(max_detections)}")
        self.only_seen = only_seen
        self.backend: Backend = backend
        self._image_sizes = {image["id"]: (image["height"], image["width"]) for image in self.ground_truth["images"]}
        self._predictions_by_image: dict[int, ImagePredictions] = {}
        self._is_synchronized = False

    def update(self, image_id: int | torch.Tensor, result: Mapping[str, Any]) -> None:
        """Add an image's predictions: `scores` (n,), `labels` (n,), and `masks` (n, H, W) bool or `rles` (n run lengths), or
        without masks `boxes` (n, 4) xyxy. Masks become run lengths at once. An image that comes again is a padded repeat of
        the last batch and is left out."""
        image_id = as_id(image_id.item() if isinstance(image_id, torch.Tensor) else image_id, "image_id")
        if image_id not in self._image_sizes:
            raise ValueError(f"image {image_id} is not in the ground truth ({len(self._image_sizes)} images)")
        if image_id in self._predictions_by_image:
            return
        predictions = ImagePredictions.from_result(image_id, result, self.category_ids)
        for position, size in enumerate(predictions.sizes or ()):
            if size != self._image_sizes[image_id]:
                raise ValueError(
                    f"image {image_id}: predicted mask {position} has (height, width) {size}, "
                    f"the image has {self._image_sizes[image_id]}"
                )
        self._predictions_by_image[image_id] = predictions
        self._is_synchronized = False

    def synchronize(self) -> None:
        """Give every rank the predictions of all ranks, each image once. Call it on all ranks; alone it does nothing."""
        if _world_size() > 1:
            gathered: list[Any] = [None] * _world_size()
            torch.distributed.all_gather_object(gathered, self._predictions_by_image)
            merged: dict[int, ImagePredictions] = {}
            for predictions_by_image in gathered:
                for image_id, predictions in predictions_by_image.items():
                    merged.setdefault(image_id, predictions)
            self._predictions_by_image = merged
        self._is_synchronized = True

    def assume_complete(self) -> None:
        """In place of `synchronize`: this process was given the predictions of all ranks, and may go on without them."""
        self._is_synchronized = True

    def coco_results(self) -> list[dict[str, Any]]:
        """All predictions in COCO's results format, by image id, then in the order they were given."""
        with collector_paused():
            return [
                result
                for image_id, predictions in sorted(self._predictions_by_image.items())
                for result in predictions.coco_results(image_id)
            ]

    @property
    def note(self) -> str | None:
        """What a reader of the numbers must know, or None."""
        notes = [self._mask_note(), *self._coverage_notes()]
        return " ".join(note for note in notes if note) or None

    def compute(self, *, per_class: bool = False) -> dict[str, float | None]:
        """COCO's numbers, 0 to 1, under `segm/...` and `bbox/...`: AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1, AR10,
        AR100 (those of `max_detections`), AR_small, AR_medium, AR_large; with `per_class` also `AP/<category name>`.

        None where there is nothing to measure: no such instance in the ground truth, or no masks (then `note` says why).
        """
        if _world_size() > 1 and not self._is_synchronized:
            raise RuntimeError("compute() before synchronize() would count only this rank's images")
        metrics: dict[str, float | None] = {}
        for iou_type in IOU_TYPES:
            is_measurable = self._evaluated_image_ids() and not (iou_type == "segm" and self._mask_note())
            evaluation = self._evaluate(iou_type) if is_measurable else None
            values = self._summarize(evaluation, per_class)
            metrics |= {f"{iou_type}/{key}": value for key, value in values.items()}
        return metrics

    def _evaluated_image_ids(self) -> list[int]:
        return sorted(self._predictions_by_image) if self.only_seen else sorted(self._image_sizes)

    def _evaluate(self, iou_type: IouType) -> tuple[np.ndarray, np.ndarray]:
        return precision_and_recall(
            self.ground_truth,
            joined(self._predictions_by_image, iou_type),
            iou_type,
            image_ids=self._evaluated_image_ids(),
            max_detections=self.max_detections,
            backend=self.backend,
        )

    def _summarize(self, arrays: tuple[np.ndarray, np.ndarray] | None, per_class: bool) -> dict[str, float | None]:
        """pycocotools' own summary knows only maxDets (1, 10, 100): the same means, read from its arrays."""
        precision_TRKAM, recall_TKAM = arrays or (np.array([]), np.array([]))

        def average(values: np.ndarray, *index: Any) -> float | None:
            if arrays is None:
                return None
            counted = values[index][values[index] > -1]
            return float(counted.mean()) if counted.size else None

        every, last = slice(None), -1
        summary = {
            "AP": average(precision_TRKAM, every, every, every, 0, last),
            "AP50": average(precision_TRKAM, 0, every, every, 0, last),
            "AP75": average(precision_TRKAM, 5, every, every, 0, last),
        }
        for area, name in enumerate(AREAS[1:], start=1):
            summary[f"AP_{name}"] = average(precision_TRKAM, every, every, every, area, last)
        for position, count in enumerate(self.max_detections):
            summary[f"AR{count}"] = average(recall_TKAM, every, every, 0, position)
        for area, name in enumerate(AREAS[1:], start=1):
            summary[f"AR_{name}"] = average(recall_TKAM, every, every, area, last)
        if per_class:
            for position, name in enumerate(_class_names(self.ground_truth["categories"])):
                summary[f"AP/{name}"] = average(precision_TRKAM, every, every, position, 0, last)
        return summary

    def _mask_note(self) -> str | None:
        """Why there is no mask AP, or None."""
        missing, total = self.ground_truth["num_without_mask"], len(self.ground_truth["annotations"])
        if total == 0:
            return "The ground truth has no annotations."
        if not self.ground_truth["has_masks"]:
            some = f" ({'; '.join(self.ground_truth['mask_problems'])})" if 0 < missing < total else ""
            return (
                f"No mask AP: {missing} of {total} annotations have no usable mask{some}. "
                "The box numbers are those of the predicted masks' own boxes, which is not mask AP."
            )
        without = sum(len(predictions) for predictions in self._predictions_by_image.values() if predictions.counts is None)
        return f"No mask AP: {without} predictions have no mask." if without else None

    def _coverage_notes(self) -> list[str]:
        notes = []
        unseen = len(self._image_sizes) - len(self._predictions_by_image)
        if unseen and not self.only_seen:
            notes.append(f"{unseen} of {len(self._image_sizes)} images had no prediction step and count as empty.")
        if unseen and self.only_seen:
            notes.append(f"Only {len(self._predictions_by_image)} of {len(self._image_sizes)} images were evaluated.")
        if not any(map(len, self._predictions_by_image.values())):
            notes.append("There are no predictions.")
        annotated = {annotation["category_id"] for annotation in self.ground_truth["annotations"]}
        unknown = sorted(annotated - set(self.category_ids))
        if unknown:
            notes.append(f"The model has no label for the categories {unknown}; they count with AP 0.")
        return notes


def _checked_category_ids(category_ids: Sequence[int], categories: Sequence[Mapping[str, Any]]) -> list[int]:
    ids = [as_id(category_id, "category id") for category_id in category_ids]
    unknown = sorted(set(ids) - {category["id"] for category in categories} - {NO_CATEGORY})
    if unknown:
        raise ValueError(f"category ids {unknown} are not among the categories of the ground truth")
    return ids


def _class_names(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names in COCOeval's order (by id); a name that two categories share gets its id."""
    ordered = sorted(categories, key=lambda category: category["id"])
    names = [str(category.get("name", category["id"])) for category in ordered]
    return [
        name if names.count(name) == 1 else f"{name} ({category['id']})" for name, category in zip(names, ordered, strict=True)
    ]


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
