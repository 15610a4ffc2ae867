"""Results of COCO's format: what is broken is refused by name, and what is sound survives a file."""

import json

import pytest
import torch
from evaluation_cases import CATEGORY_IDS, evaluate, random_case, rle, small_case, square

from sim_hf.evaluation import CocoEvaluator, from_coco_results, to_coco_results

GOOD = {"scores": [0.5], "labels": [0], "masks": torch.ones(1, 40, 40, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("image_id", "change", "message"),
    [
        (5, {"scores": [float("nan")]}, "image 5: scores are not all finite"),
        (5, {"scores": [float("inf")]}, "image 5: scores are not all finite"),
        (5, {"boxes": [[0.0, 0.0, float("nan"), 1.0]]}, "image 5: boxes are not all finite"),
        (5, {"boxes": [[0.0, 0.0, 1.0]]}, r"boxes must be \(1, 4\)"),
        (5, {"scores": [0.5, 0.6]}, r"scores \(2,\) and labels \(1,\)"),
        (5, {"scores": None}, "no 'scores'"),
        (5, {"labels": [3]}, "label 3 has no category"),
        (5, {"labels": [-1]}, "label -1 has no category"),
        (5, {"labels": [0.5]}, "label 0.5 has no category"),
        (5, {"masks": torch.ones(1, 40, 41, dtype=torch.bool)}, r"\(40, 41\), the image has \(40, 40\)"),
        (5, {"masks": torch.ones(1, 40, 40)}, "masks must be bool"),
        (5, {"masks": torch.ones(2, 40, 40, dtype=torch.bool)}, "2 masks for 1 scores"),
        (5, {"masks": None}, "needs masks, rles or boxes"),
        (5, {"rles": [{"size": [40, 40]}]}, "image 5: run lengths 0 are broken"),
        (5, {"rles": [{"counts": "1"}]}, "image 5: run lengths 0 are broken"),
        (5, {"rles": [{"size": [40, 40], "counts": "P"}]}, "image 5: run lengths 0 are broken: .*middle of a number"),
        (5, {"rles": [{"size": [40, 40], "counts": "O"}]}, "image 5: run lengths 0 are broken: .*negative"),
        (5, {"rles": [rle(square(0, 0, 9)), {"size": [40, 40], "counts": "5"}]}, "image 5: run lengths 1 .*add up to 5, .*1600"),
        (5, {"rles": [{"size": [40, 40], "counts": "\u00e9"}]}, "image 5: run lengths 0 are broken: .*not ASCII"),
        (99, {}, "image 99 is not in the ground truth"),
        ("five", {}, "image_id must be an integer, got 'five'"),
        (5.0, {}, "image_id must be an integer, got 5.0"),
    ],
)
def test_broken_results_are_refused_by_name(image_id, change, message):
    evaluator = CocoEvaluator(small_case()[0], CATEGORY_IDS)
    with pytest.raises(ValueError, match=message):
        evaluator.update(image_id, GOOD | change)
    assert evaluator.coco_results() == []


def test_category_ids_must_be_those_of_the_ground_truth():
    with pytest.raises(ValueError, match=r"\[8\] are not among the categories"):
        CocoEvaluator(small_case()[0], [7, 8])


def test_label_without_a_category_is_allowed_but_may_not_be_predicted():
    evaluator = CocoEvaluator(small_case()[0], [7, -1])
    evaluator.update(5, GOOD)
    with pytest.raises(ValueError, match="label 1 has no category"):
        evaluator.update(6, GOOD | {"labels": [1]})


def test_coco_results_survive_json_and_give_the_same_numbers():
    ground_truth, results = random_case(2)
    predictions = [p for i, result in results.items() for p in to_coco_results(i, result, CATEGORY_IDS)]
    again = from_coco_results(json.loads(json.dumps(predictions)), CATEGORY_IDS)
    assert evaluate(ground_truth, again) == evaluate(ground_truth, results)
    assert [p for i, r in again.items() for p in to_coco_results(i, r, CATEGORY_IDS)] == predictions


def test_box_results_round_trip():
    boxes = [{"image_id": 5, "category_id": 3, "score": 0.5, "bbox": [1.0, 2.0, 3.5, 4.0]}]
    result = from_coco_results(boxes, CATEGORY_IDS)
    assert result[5]["boxes"].tolist() == [[1.0, 2.0, 4.5, 6.0]] and to_coco_results(5, result[5], CATEGORY_IDS) == boxes


def test_unknown_category_in_coco_results_is_refused():
    with pytest.raises(ValueError, match="category 4 of the results"):
        from_coco_results([{"image_id": 5, "category_id": 4, "score": 0.5, "bbox": [0, 0, 1, 1]}], CATEGORY_IDS)
