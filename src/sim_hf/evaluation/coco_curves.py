"""COCO's precision and recall from the matches of all images, as pycocotools' `accumulate` has them, to the last bit.

Precision is read at the places where recall rises, and there it is highest, up to the next one: the true positives are all
that is looked at, and of the others only how many there were before.

Shape letters: as in `coco_matching`; R recall levels, K categories, M detection limits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sim_hf.evaluation.coco_matching import AREA_RANGES, IOU_THRESHOLDS, Matches

RECALL_LEVELS = np.linspace(0.0, 1.0, 101)


def accumulate(matches: Matches, num_categories: int, max_detections: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """-> precision (T, R, K, A, M) and recall (T, K, A, M), -1 where there is nothing to find."""
    shape = (len(IOU_THRESHOLDS), num_categories, len(AREA_RANGES), len(max_detections))
    precision_TRKAM = np.full((shape[0], len(RECALL_LEVELS), *shape[1:]), -1.0)
    recall_TKAM = np.full(shape, -1.0)
    # From the best score down, over all images of a category; equals as they come.
    order_D = np.lexsort((-matches.scores_D, matches.categories_D))
    place_D = np.empty_like(order_D)
    place_D[order_D] = np.arange(len(order_D))
    order_C = np.argsort(place_D[matches.candidates_C])
    candidates_C = matches.candidates_C[order_C]
    taken_CTA, ignored_CTA = matches.taken_CTA[order_C], matches.taken_ignored_CTA[order_C]
    edges = np.arange(num_categories + 1)
    edges_D = np.searchsorted(matches.categories_D, edges)
    edges_C = np.searchsorted(matches.categories_D[candidates_C], edges)
    edges_G = np.searchsorted(matches.categories_G, edges)
    for k in range(num_categories):
        numbers_A = matches.counts_GA[edges_G[k] : edges_G[k + 1]].sum(0)
        mine_D, mine_C = order_D[edges_D[k] : edges_D[k + 1]], slice(edges_C[k], edges_C[k + 1])
        place_C = place_D[candidates_C[mine_C]] - edges_D[k]
        for m, limit in enumerate(max_detections):
            kept_D = matches.ranks_D[mine_D] < limit
            kept_C = kept_D[place_C]
            in_range_DA = matches.in_range_DA[mine_D] & kept_D[:, None]
            taken = taken_CTA[mine_C] & kept_C[:, None, None]
            # What took no object is false, where its area is in range.
            false_CTA = np.cumsum(in_range_DA, 0)[place_C, None] - np.cumsum(taken & in_range_DA[place_C, None], 0)
            true_CTA = taken & ~ignored_CTA[mine_C]
            for a in np.flatnonzero(numbers_A):
                for t in range(len(IOU_THRESHOLDS)):
                    false = false_CTA[true_CTA[:, t, a], t, a]
                    precision, recall = _curve(false, int(numbers_A[a]))
                    precision_TRKAM[t, :, k, a, m], recall_TKAM[t, k, a, m] = precision, recall
    return precision_TRKAM, recall_TKAM


def _curve(num_false: np.ndarray, num_objects: int) -> tuple[np.ndarray, float]:
    """num_false: false positives before each true one. -> precision at the recall levels (R,), and the recall reached."""
    num_true = np.arange(1, len(num_false) + 1)
    recall = num_true / num_objects
    precision = num_true / (num_false + num_true + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALL_LEVELS)
    levels = np.append(precision, 0.0)[places]  # not reached: 0
    return levels, float(recall[-1]) if len(recall) else 0.0
