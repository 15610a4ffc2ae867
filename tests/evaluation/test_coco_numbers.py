"""The numbers of CocoEvaluator are pycocotools', those of a second implementation, and those that one calculates by hand."""

import contextlib
import copy
import io
import random

import numpy as np
import pytest
import torch
from evaluation_cases import CATEGORY_IDS, evaluate, random_case, small_case, square
from mini_average_precision import summary
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sim_hf.evaluation import to_coco_results

NUM_CASES = 50
STATS = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
STATS += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]


def direct_pycocotools(ground_truth: dict, results: dict[int, dict], iou_type: str) -> dict:
    predictions = [p for i in sorted(results) for p in to_coco_results(i, results[i], CATEGORY_IDS)]
    for prediction in predictions:
        prediction.pop("bbox" if iou_type == "segm" else "segmentation")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(predictions), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: None if value == -1 else value for name, value in zip(STATS, evaluation.stats, strict=True)}


def mini(ground_truth: dict, results: dict[int, dict], iou_type: str) -> dict:
    def region(prediction: dict):
        if iou_type == "bbox":
            return tuple(prediction["bbox"])
        bits_HW = coco_mask.decode(prediction["segmentation"]).astype(bool)
        return int.from_bytes(np.packbits(bits_HW).tobytes(), "big")

    things = [
        {"image": a["image_id"], "category": a["category_id"], "area": a["area"], "crowd": a["iscrowd"], "region": region(a)}
        for a in ground_truth["annotations"]
    ]
    detections = []
    for image_id, result in results.items():
        for p in to_coco_results(image_id, result, CATEGORY_IDS):
            r = region(p)
            area = r.bit_count() if iou_type == "segm" else r[2] * r[3]
            detections.append({"image": image_id, "category": p["category_id"], "score": p["score"], "region": r, "area": area})
    return summary([image["id"] for image in ground_truth["images"]], CATEGORY_IDS, things, detections)


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or actual[name] is None:
            assert actual[name] is value, name
        else:
            assert abs(actual[name] - value) <= tolerance, name


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_numbers_equal_pycocotools_and_the_second_implementation(seed):
    ground_truth, results = random_case(seed)
    metrics = evaluate(ground_truth, results)
    by_reference = evaluate(ground_truth, results, backend="pycocotools")
    for iou_type in ("segm", "bbox"):
        ours = {name: metrics[f"{iou_type}/{name}"] for name in STATS}
        second = mini(ground_truth, results, iou_type)
        assert_close(ours, second, 1e-9)
        if any(len(result["scores"]) for result in results.values()):  # pycocotools cannot read an empty list
            direct = direct_pycocotools(ground_truth, results, iou_type)
            assert {name: by_reference[f"{iou_type}/{name}"] for name in STATS} == direct
            assert_close(ours, direct, 1e-12)


def test_hand_computed_average_precision():
    """One object, a miss with score 0.9 and a hit with 0.8: precision 1/2 at every recall; the hit has IoU 80/100."""
    ground_truth, _ = small_case()
    ground_truth["annotations"] = ground_truth["annotations"][:1]
    hit = square(0, 0, 10)
    hit[8:] = False
    result = {
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([0, 0]),
        "masks": torch.from_numpy(np.stack([square(20, 20, 10), hit])),
    }
    metrics = evaluate(ground_truth, {5: result})
    assert metrics["segm/AP50"] == metrics["segm/AP75"] == pytest.approx(0.5)
    # thresholds 0.50 ... 0.75 and 0.80: numpy's 0.8 of the list is 0.7999..., so 7 of the 10 count
    assert metrics["segm/AP"] == pytest.approx(0.5 * 7 / 10)
    assert (metrics["segm/AR1"], metrics["segm/AR10"]) == (0.0, pytest.approx(0.7))
    assert metrics["segm/AP_small"] == pytest.approx(0.35) and metrics["segm/AP_large"] is None


@pytest.mark.parametrize("first_id", [0, 1, 17])
def test_ground_truth_as_prediction_scores_one_whatever_the_ids(first_id):
    metrics = evaluate(*small_case(first_id))
    assert metrics["segm/AP"] == metrics["bbox/AP"] == metrics["segm/AR10"] == 1.0


def test_nothing_depends_on_order_or_names_of_images_and_categories():
    ground_truth, results = random_case(3)
    rng = random.Random(0)
    for result in results.values():  # ties are broken by position, so there may be none here
        result["scores"] = torch.rand(len(result["scores"]), dtype=torch.float64)
    expected = evaluate(ground_truth, results)
    shuffled = copy.deepcopy(ground_truth)
    new_image = {image["id"]: 5000 - image["id"] for image in ground_truth["images"]}
    new_category = {7: 1, 3: 2, 90: 0}
    for image in shuffled["images"]:
        image["id"] = new_image[image["id"]]
    for category in shuffled["categories"]:
        category["id"] = new_category[category["id"]]
    for annotation in shuffled["annotations"]:
        annotation["image_id"] = new_image[annotation["image_id"]]
        annotation["category_id"] = new_category[annotation["category_id"]]
    for part in shuffled.values():
        rng.shuffle(part)
    renamed = {}
    for image_id in rng.sample(sorted(results), len(results)):
        order = torch.randperm(len(results[image_id]["scores"]))
        renamed[new_image[image_id]] = {name: value[order] for name, value in results[image_id].items()}
    actual = evaluate(shuffled, renamed, [new_category[category_id] for category_id in CATEGORY_IDS])
    assert_close(actual, expected, 1e-12)


def test_wrong_prediction_with_score_zero_never_raises_ap():
    for seed in range(5):
        ground_truth, results = random_case(seed)
        before = evaluate(ground_truth, results)
        for image in ground_truth["images"]:
            result = results[image["id"]]
            result["scores"] = torch.cat([result["scores"], torch.zeros(1)])
            result["labels"] = torch.cat([result["labels"], torch.zeros(1, dtype=torch.long)])
            result["masks"] = torch.cat([result["masks"], torch.zeros(1, image["height"], image["width"], dtype=torch.bool)])
        after = evaluate(ground_truth, results)
        assert all(before[key] is None or after[key] <= before[key] for key in ("segm/AP", "bbox/AP", "segm/AP50"))
