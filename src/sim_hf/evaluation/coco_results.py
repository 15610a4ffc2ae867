"""Predictions of an image: what a model gives, what COCO's results format has, and between them what is kept.

Shape letters: n predictions of an image, H W its rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sim_hf.data.cropped_masks import CroppedMasks
from sim_hf.data.masks import checked_rles, encode_rle, rle_areas, rle_boxes
from sim_hf.evaluation.coco_matching import Instances, IouType
from sim_hf.evaluation.ground_truth import as_id

NO_CATEGORY = -1  # in `category_ids`: a label of the model that the data set does not have; it may not be predicted


@dataclass(frozen=True)
class ImagePredictions:
    """boxes_n4: xywh. areas_n: of the masks. sizes, counts: run lengths. The last three are None without masks.

    No dictionary per prediction: with half a million of them, Python's collector of cycles would take half of the time.
    """

    scores_n: np.ndarray
    category_ids_n: np.ndarray
    boxes_n4: np.ndarray
    areas_n: np.ndarray | None
    sizes: list[tuple[int, int]] | None
    counts: list[str] | None

    @staticmethod
    def from_result(image_id: int, result: Mapping[str, Any], category_ids: Sequence[int]) -> ImagePredictions:
        """What `CocoEvaluator.update` takes, checked."""
        scores_n, labels_n = _numbers(result, "scores", image_id), _numbers(result, "labels", image_id)
        if scores_n.ndim != 1 or scores_n.shape != labels_n.shape:
            raise ValueError(f"image {image_id}: scores {scores_n.shape} and labels {labels_n.shape} must both be (n,)")
        known = {label for label, category_id in enumerate(category_ids) if category_id != NO_CATEGORY}
        bad_labels = [label for label in labels_n.tolist() if label not in known]
        if bad_labels:
            raise ValueError(f"image {image_id}: label {bad_labels[0]:g} has no category, known are {sorted(known)[:20]}")
        category_ids_n = np.asarray(category_ids, dtype=np.int64)[labels_n.astype(np.int64)]
        count = len(scores_n)
        boxes_n4 = _numbers(result, "boxes", image_id) if result.get("boxes") is not None else None
        if boxes_n4 is not None and boxes_n4.shape != (count, 4) and not boxes_n4.size == count == 0:
            raise ValueError(f"image {image_id}: boxes must be ({count}, 4) xyxy, got {boxes_n4.shape}")
        rles = _run_lengths(result, image_id)
        if rles is not None:
            if len(rles) != count:
                raise ValueError(f"image {image_id}: {len(rles)} masks for {count} scores")
            # All at once: a call costs more than a box.
            sizes, counts = [(rle["size"][0], rle["size"][1]) for rle in rles], [rle["counts"] for rle in rles]
            return ImagePredictions(scores_n, category_ids_n, rle_boxes(rles), rle_areas(rles), sizes, counts)
        if boxes_n4 is None:
            raise ValueError(f"image {image_id}: a result needs masks, rles or boxes, got {sorted(result)}")
        boxes_n4 = boxes_n4.reshape(count, 4)
        boxes_n4 = np.concatenate([boxes_n4[:, :2], boxes_n4[:, 2:] - boxes_n4[:, :2]], 1)
        return ImagePredictions(scores_n, category_ids_n, boxes_n4, None, None, None)

    def __len__(self) -> int:
        return len(self.scores_n)

    def coco_results(self, image_id: int) -> list[dict[str, Any]]:
        """In COCO's results format, ready for JSON."""
        image_id = int(image_id)
        columns = (self.category_ids_n.tolist(), self.scores_n.tolist(), self.boxes_n4.tolist())
        if self.sizes is None or self.counts is None:
            return [
                {"image_id": image_id, "category_id": category_id, "score": score, "bbox": box}
                for category_id, score, box in zip(*columns, strict=True)
            ]
        return [
            {
                "image_id": image_id,
                "category_id": category_id,
                "score": score,
                "segmentation": {"size": [*size], "counts": counts},
                "bbox": box,
            }
            for category_id, score, box, size, counts in zip(*columns, self.sizes, self.counts, strict=True)
        ]


def joined(by_image: Mapping[int, ImagePredictions], iou_type: IouType) -> Instances:
    """The predictions of all images, by image id, then in the order they were given. Masks are judged by their own area, not
    by that of their box."""
    image_ids, parts = sorted(by_image), [by_image[image_id] for image_id in sorted(by_image)]

    def column(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(getattr(part, name) for part in parts)])

    boxes_N4 = column("boxes_n4", np.zeros((0, 4)))
    is_segm = iou_type == "segm"
    return Instances(
        image_ids_N=np.repeat(np.array(image_ids, np.int64), [len(part) for part in parts]),
        category_ids_N=column("category_ids_n", np.zeros(0, np.int64)),
        boxes_N4=boxes_N4,
        areas_N=column("areas_n", np.zeros(0)) if is_segm else boxes_N4[:, 2] * boxes_N4[:, 3],
        crowd_N=np.zeros(len(boxes_N4), bool),
        scores_N=column("scores_n", np.zeros(0)),
        sizes=[size for part in parts for size in part.sizes or ()] if is_segm else None,
        counts=[counts for part in parts for counts in part.counts or ()] if is_segm else None,
    )


def to_coco_results(image_id: int, result: Mapping[str, Any], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """An image's predictions as COCO results: original category ids, `segmentation` as run lengths ready for JSON, `bbox`
    xywh: the mask's own box, or the given one where there is no mask.

    With pycocotools' `loadRes`, which takes area from `bbox` when a result has one, drop `bbox` for mask AP by size.
    """
    return ImagePredictions.from_result(image_id, result, category_ids).coco_results(image_id)


def from_coco_results(results: Iterable[Mapping[str, Any]], category_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """COCO results -> image id -> what `CocoEvaluator.update` takes: scores, labels, and `rles` or `boxes` xyxy (float64)."""
    label_of = {int(category_id): label for label, category_id in enumerate(category_ids)}
    by_image: dict[int, list[Mapping[str, Any]]] = {}
    for result in results:
        by_image.setdefault(as_id(result["image_id"], "image_id"), []).append(result)
    converted = {}
    for image_id, group in by_image.items():
        unknown = {result["category_id"] for result in group} - set(label_of)
        if unknown:
            raise ValueError(f"image {image_id}: category {min(unknown)} of the results is not among the known ones")
        fields: dict[str, Any] = {
            "scores": torch.tensor([result["score"] for result in group], dtype=torch.float64),
            "labels": torch.tensor([label_of[result["category_id"]] for result in group]),
        }
        with_masks = sum("segmentation" in result for result in group)
        if with_masks not in (0, len(group)):
            raise ValueError(f"image {image_id}: {with_masks} of {len(group)} results have a segmentation")
        if with_masks:
            fields["rles"] = [result["segmentation"] for result in group]
        else:
            boxes_n4 = torch.tensor([result["bbox"] for result in group], dtype=torch.float64).reshape(-1, 4)
            boxes_n4[:, 2:] += boxes_n4[:, :2]
            fields["boxes"] = boxes_n4
        converted[image_id] = fields
    return converted


def _numbers(result: Mapping[str, Any], field: str, image_id: int) -> np.ndarray:
    """A field as finite float64 numbers. pycocotools counts NaN scores and boxes as matches."""
    if result.get(field) is None:
        raise ValueError(f"image {image_id}: the result has no {field!r}, it has {sorted(result)}")
    values = torch.as_tensor(result[field]).detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"image {image_id}: {field} are not all finite")
    return values


def _run_lengths(result: Mapping[str, Any], image_id: int) -> list[Any] | None:
    masks_nHW, rles = result.get("masks"), result.get("rles")
    if rles is not None:
        try:
            return checked_rles(list(rles))
        except ValueError as error:
            raise ValueError(f"image {image_id}: {error}") from error
    if masks_nHW is None:
        return None
    if isinstance(masks_nHW, CroppedMasks):
        return masks_nHW.run_lengths()
    masks_nHW = torch.as_tensor(masks_nHW).detach()
    if masks_nHW.dtype != torch.bool or masks_nHW.ndim != 3:
        raise ValueError(f"image {image_id}: masks must be bool (n, H, W), got {masks_nHW.dtype} {tuple(masks_nHW.shape)}")
    return [encode_rle(mask_HW) for mask_HW in masks_nHW.cpu().numpy()]
