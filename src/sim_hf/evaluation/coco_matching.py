"""COCO's matching of predictions and objects, for all images and classes in a few steps of numpy.

A *cell* is an image and a class; only within one can a prediction take an object. From the best score down, each takes the
object it overlaps most of those still free, if the overlap reaches the threshold; objects that do not count (crowds, and
those of another size than the area range) come last. Few predictions overlap any object by half, the lowest threshold, and
only these are looked at: a bound from boxes and areas leaves out most of the others before a mask is read.

Shape letters: N instances; D predictions and G objects, by cell; P pairs of the two; C the predictions that are in a pair; T
IoU thresholds, A area ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
from pycocotools import mask as coco_mask

from sim_hf.data.masks import rle_areas, rle_boxes

IouType = Literal["segm", "bbox"]

# All as pycocotools has them, to the last bit.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREA_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, small, medium, large
_MARGIN = 1e-6  # of the bound, far above its rounding
_PAIRS_AT_A_TIME = 1 << 17


@dataclass(frozen=True)
class Instances:
    """Predictions or objects, in the order they were given. boxes_N4: xywh. crowd_N: False for predictions. scores_N: 0 for
    objects. sizes, counts: compressed run lengths, or None; an object's own area and box may be others than its mask's."""

    image_ids_N: np.ndarray
    category_ids_N: np.ndarray
    boxes_N4: np.ndarray
    areas_N: np.ndarray
    crowd_N: np.ndarray
    scores_N: np.ndarray
    sizes: Sequence[Sequence[int]] | None = None
    counts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.image_ids_N)

    def run_lengths(self, chosen: np.ndarray) -> list[Any]:
        sizes, counts = cast(Any, self.sizes), cast(Any, self.counts)
        return [{"size": sizes[i], "counts": counts[i]} for i in chosen.tolist()]


@dataclass(frozen=True)
class Matches:
    """What accumulating needs. `categories_*`: numbers of the categories, by which both are sorted; the predictions of a
    category by image, then from the best score down. ranks_D: place among those of the cell. taken_*: for the predictions
    `candidates_C`, whether they took an object, and one that does not count; all others took none."""

    categories_D: np.ndarray
    scores_D: np.ndarray
    ranks_D: np.ndarray
    in_range_DA: np.ndarray
    categories_G: np.ndarray
    counts_GA: np.ndarray
    candidates_C: np.ndarray
    taken_CTA: np.ndarray
    taken_ignored_CTA: np.ndarray


def match(
    predictions: Instances,
    objects: Instances,
    iou_type: IouType,
    *,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    max_detections: int,
) -> Matches:
    """image_ids: those to evaluate; category_ids: all. max_detections: of a cell."""
    images, categories = np.unique(np.asarray(image_ids, np.int64)), np.unique(np.asarray(category_ids, np.int64))
    order_D, cells_D = _by_cell(predictions, images, categories)
    order_G, cells_G = _by_cell(objects, images, categories)
    ranks_D = np.arange(len(cells_D)) - np.searchsorted(cells_D, cells_D)
    kept = ranks_D < max_detections
    order_D, cells_D, ranks_D = order_D[kept], cells_D[kept], ranks_D[kept]
    pairs_P2, ious_P = _overlapping(predictions, objects, iou_type, (order_D, cells_D), (order_G, cells_G))
    counts_GA = _in_range(objects.areas_N[order_G]) & ~objects.crowd_N[order_G, None]
    candidates_C, taken_CTA, ignored_CTA = _take(pairs_P2, ious_P, cells_D, counts_GA, objects.crowd_N[order_G])
    return Matches(
        categories_D=cells_D // max(len(images), 1),
        scores_D=predictions.scores_N[order_D],
        ranks_D=ranks_D,
        in_range_DA=_in_range(predictions.areas_N[order_D]),
        categories_G=cells_G // max(len(images), 1),
        counts_GA=counts_GA,
        candidates_C=candidates_C,
        taken_CTA=taken_CTA,
        taken_ignored_CTA=ignored_CTA,
    )


def _by_cell(instances: Instances, images: np.ndarray, categories: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which instances are evaluated, by category, image and falling score, equals as they were given -> and their cells."""
    known = np.flatnonzero(np.isin(instances.image_ids_N, images) & np.isin(instances.category_ids_N, categories))
    image = np.searchsorted(images, instances.image_ids_N[known])
    cells = np.searchsorted(categories, instances.category_ids_N[known]) * len(images) + image
    order = np.lexsort((-instances.scores_N[known], cells))
    return known[order], cells[order]


def _in_range(areas_N: np.ndarray) -> np.ndarray:
    return (areas_N[:, None] >= AREA_RANGES[:, 0]) & (areas_N[:, None] <= AREA_RANGES[:, 1])


def _overlapping(
    predictions: Instances,
    objects: Instances,
    iou_type: IouType,
    sorted_D: tuple[np.ndarray, np.ndarray],
    sorted_G: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that reach the lowest threshold: prediction and object (P, 2), and their IoU (P,)."""
    (order_D, cells_D), (order_G, cells_G) = sorted_D, sorted_G
    boxes_G4, areas_G, crowd_G = objects.boxes_N4[order_G], objects.areas_N[order_G], objects.crowd_N[order_G]
    if iou_type == "segm":  # those of the annotation file may be others than the mask's
        run_lengths = objects.run_lengths(order_G)
        boxes_G4, areas_G = rle_boxes(run_lengths), rle_areas(run_lengths)
    found_pairs, found_ious = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    for d, g in _pairs_of_cells(cells_D, cells_G):
        boxes_P4, others_P4 = predictions.boxes_N4[order_D[d]], boxes_G4[g]
        common_P = _common_area(boxes_P4, others_P4)
        if iou_type == "segm":
            areas_P, other_areas_P = predictions.areas_N[order_D[d]], areas_G[g]
            common_P = np.minimum(np.minimum(common_P, areas_P), other_areas_P)
            near = _iou(common_P, areas_P, other_areas_P, crowd_G[g]) >= IOU_THRESHOLDS[0] - _MARGIN
            d, g = d[near], g[near]
            ious_P = _mask_ious(predictions, objects, order_D[d], order_G[g], cells_D[d])
        else:
            ious_P = _iou(common_P, boxes_P4[:, 2] * boxes_P4[:, 3], others_P4[:, 2] * others_P4[:, 3], crowd_G[g])
        enough = ious_P >= IOU_THRESHOLDS[0]
        found_pairs.append(np.stack([d[enough], g[enough]], 1))
        found_ious.append(ious_P[enough])
    return np.concatenate(found_pairs), np.concatenate(found_ious)


def _pairs_of_cells(cells_D: np.ndarray, cells_G: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs within a cell, some predictions at a time: prediction (P,) and object (P,)."""
    first_D, last_D = np.searchsorted(cells_G, cells_D, "left"), np.searchsorted(cells_G, cells_D, "right")
    ends_D = np.cumsum(last_D - first_D)
    start = 0
    while start < len(cells_D):
        done = ends_D[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends_D, done + _PAIRS_AT_A_TIME, "right")), start + 1)
        number = (last_D - first_D)[start:stop]
        d = np.repeat(np.arange(start, stop), number)
        yield d, np.arange(len(d)) - np.repeat(ends_D[start:stop] - number - done, number) + first_D[d]
        start = stop


def _common_area(boxes_P4: np.ndarray, others_P4: np.ndarray) -> np.ndarray:
    sides_P2 = np.minimum(boxes_P4[:, :2] + boxes_P4[:, 2:], others_P4[:, :2] + others_P4[:, 2:])
    sides_P2 -= np.maximum(boxes_P4[:, :2], others_P4[:, :2])
    return np.where((sides_P2 > 0).all(1), sides_P2[:, 0] * sides_P2[:, 1], 0.0)


def _iou(common_P: np.ndarray, areas_P: np.ndarray, other_areas_P: np.ndarray, crowd_P: np.ndarray) -> np.ndarray:
    """Over the first alone where the second is a crowd."""
    union_P = np.where(crowd_P, areas_P, areas_P + other_areas_P - common_P)
    return np.divide(common_P, union_P, out=np.zeros_like(common_P), where=common_P > 0)


def _mask_ious(
    predictions: Instances, objects: Instances, chosen_P: np.ndarray, others_P: np.ndarray, cells_P: np.ndarray
) -> np.ndarray:
    """By pycocotools, all pairs of a cell in one call."""
    ious_P = np.zeros(len(chosen_P))
    starts = np.flatnonzero(np.diff(cells_P, prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(cells_P)]):
        mine, row = np.unique(chosen_P[start:stop], return_inverse=True)
        theirs, column = np.unique(others_P[start:stop], return_inverse=True)
        crowd = objects.crowd_N[theirs].astype(np.uint8)
        ious: Any = coco_mask.iou(predictions.run_lengths(mine), objects.run_lengths(theirs), cast(Any, crowd))
        ious_P[start:stop] = ious[row, column]
    return ious_P


def _take(
    pairs_P2: np.ndarray, ious_P: np.ndarray, cells_D: np.ndarray, counts_GA: np.ndarray, crowd_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> candidates (C,), whether they took an object (C, T, A), and whether it was one that does not count (C, T, A).

    First the best candidate of each cell, then the second best of each, and so on: those of a step cannot be rivals.
    """
    candidates_C, candidate_P = np.unique(pairs_P2[:, 0], return_inverse=True)
    cells_C = cells_D[candidates_C]
    step_P = (np.arange(len(cells_C)) - np.searchsorted(cells_C, cells_C))[candidate_P]
    # A candidate's pairs from the worst to the best; of equals, pycocotools takes the last.
    order_P = np.lexsort((pairs_P2[:, 1], ious_P, candidate_P, step_P))
    step_P, candidate_P, object_P, ious_P = step_P[order_P], candidate_P[order_P], pairs_P2[order_P, 1], ious_P[order_P]
    shape = (len(candidates_C), len(IOU_THRESHOLDS), len(AREA_RANGES))
    taken_CTA, ignored_CTA = np.zeros(shape, bool), np.zeros(shape, bool)
    is_gone_GTA = np.zeros((len(crowd_G), *shape[1:]), bool)
    steps = np.flatnonzero(np.diff(step_P, prepend=-1)).tolist()
    for start, stop in pairwise([*steps, len(step_P)]):
        part, num_pairs = slice(start, stop), stop - start
        g = object_P[part]
        is_free = (~is_gone_GTA[g] | crowd_G[g, None, None]) & (ious_P[part, None] >= IOU_THRESHOLDS)[:, :, None]
        place = np.arange(num_pairs)[:, None, None]
        # One that counts is better than all that do not.
        value = np.where(is_free, place + num_pairs * counts_GA[g][:, None, :], -1)
        first = np.flatnonzero(np.diff(candidate_P[part], prepend=-1))
        best = np.maximum.reduceat(value, first)
        c = candidate_P[part][first]
        taken_CTA[c], ignored_CTA[c] = best >= 0, (best >= 0) & (best < num_pairs)
        _, t, a = has = np.nonzero(best >= 0)
        is_gone_GTA[g[best[has] % num_pairs], t, a] = True
    return candidates_C, taken_CTA, ignored_CTA
