"""CocoEvaluator has an error or a defined answer where pycocotools goes wrong."""

import copy

import numpy as np
import pytest
import torch
from evaluation_cases import CATEGORY_IDS, evaluate, random_case, small_case, square

from sim_hf.evaluation import CocoEvaluator, coco_ground_truth


def test_duplicate_annotation_ids_do_not_matter():
    ground_truth, results = small_case()
    for annotation in ground_truth["annotations"]:
        annotation["id"] = 4
    assert evaluate(ground_truth, results)["segm/AP"] == 1.0


def test_missing_area_and_iscrowd_are_filled():
    ground_truth, results = small_case()
    for annotation in ground_truth["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert evaluate(ground_truth, results) == evaluate(*small_case())


def test_equal_scores_are_counted_in_order_of_image_and_position():
    ground_truth, _ = small_case()
    ground_truth["annotations"] = ground_truth["annotations"][:1]
    right, wrong = square(0, 0, 10), square(20, 20, 10)

    def average_precision(masks: list[np.ndarray]) -> float:
        result = {"scores": torch.ones(2), "labels": torch.zeros(2), "masks": torch.from_numpy(np.stack(masks))}
        return evaluate(ground_truth, {5: result})["segm/AP"]

    assert [average_precision(masks) for masks in ([right, wrong], [wrong, right])] == pytest.approx([1.0, 0.5])


def test_results_may_come_in_any_order_of_images_even_with_ties():
    for seed in range(5):
        ground_truth, results = random_case(seed)
        backwards = dict(reversed(results.items()))
        assert evaluate(ground_truth, results) == evaluate(ground_truth, backwards)


def test_no_predictions_give_zeros_and_a_note():
    ground_truth, results = small_case()
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    empty = {"scores": torch.zeros(0), "labels": torch.zeros(0), "masks": torch.zeros(0, 40, 40, dtype=torch.bool)}
    for image_id in results:
        evaluator.update(image_id, empty | {"boxes": torch.zeros(0, 4)})
    metrics = evaluator.compute()
    assert metrics["segm/AP"] == metrics["bbox/AR100"] == 0.0 and metrics["segm/AP_large"] is None
    assert evaluator.note == "There are no predictions."


def test_nothing_seen_at_all_is_zero_or_with_only_seen_none():
    ground_truth, _ = small_case()
    assert CocoEvaluator(ground_truth, CATEGORY_IDS).compute()["segm/AP"] == 0.0
    assert set(CocoEvaluator(ground_truth, CATEGORY_IDS, only_seen=True).compute().values()) == {None}


def test_unseen_images_count_as_empty_unless_only_seen():
    ground_truth, results = small_case()
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    evaluator.update(5, results[5])
    assert evaluator.compute()["segm/AR100"] == pytest.approx(1 / 3)
    assert "2 of 3 images had no prediction step" in evaluator.note
    assert evaluate(ground_truth, {5: results[5]}, only_seen=True)["segm/AR100"] == 1.0


def test_ground_truth_without_annotations_has_nothing_to_measure():
    ground_truth, results = small_case()
    ground_truth["annotations"] = []
    assert set(evaluate(ground_truth, results).values()) == {None}


def test_box_only_ground_truth_gives_box_numbers_of_the_masks_and_says_so():
    ground_truth, results = small_case()
    for annotation in ground_truth["annotations"]:
        del annotation["segmentation"]
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    for image_id, result in results.items():  # these boxes are wrong on purpose: the masks' own boxes count
        evaluator.update(image_id, result | {"boxes": torch.zeros(2, 4)})
    metrics = evaluator.compute()
    assert metrics["bbox/AP"] == 1.0
    assert {value for key, value in metrics.items() if key.startswith("segm/")} == {None}
    assert "6 of 6 annotations have no usable mask" in evaluator.note and "not mask AP" in evaluator.note


def test_partly_masked_ground_truth_gives_no_mask_ap_and_names_the_gap():
    ground_truth, _ = small_case()
    del ground_truth["annotations"][4]["segmentation"]
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    assert evaluator.compute()["segm/AP"] is None
    assert "1 of 6 annotations have no usable mask (annotation 5 has no segmentation)" in evaluator.note


def test_predictions_without_masks_give_box_numbers_only():
    ground_truth, _ = small_case()
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    evaluator.update(5, {"scores": [0.9], "labels": [0], "boxes": [[0.0, 0.0, 10.0, 10.0]]})
    metrics = evaluator.compute()
    assert metrics["segm/AP"] is None and metrics["bbox/AR100"] == pytest.approx((1 / 3 + 0) / 2)
    assert "1 predictions have no mask" in evaluator.note


@pytest.mark.parametrize("limits", [(100,), (1, 10, 300), (300, 2), (1, 10, 100)])
def test_other_detection_limits_work(limits):
    metrics = evaluate(*small_case(), max_detections=limits)
    assert metrics["segm/AP"] == 1.0 and [key for key in metrics if key.startswith("segm/AR") and key[-1].isdigit()] == [
        f"segm/AR{limit}" for limit in sorted(limits)
    ]


def test_detections_beyond_the_limit_do_not_count():
    ground_truth, _ = small_case()
    ground_truth["annotations"] = ground_truth["annotations"][:1]
    masks = torch.from_numpy(np.stack([square(20, 20, 5), square(20, 25, 5), square(0, 0, 10)]))
    result = {"scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.zeros(3), "masks": masks}
    assert evaluate(ground_truth, {5: result}, max_detections=(2,))["segm/AP"] == 0.0
    assert evaluate(ground_truth, {5: result}, max_detections=(3,))["segm/AP"] == pytest.approx(1 / 3)


def test_category_that_the_model_lacks_counts_with_zero_and_is_told():
    ground_truth, results = small_case()
    one_label = {i: {name: value[:1] for name, value in result.items()} for i, result in results.items()}
    evaluator = CocoEvaluator(ground_truth, [7])
    for image_id, result in one_label.items():
        evaluator.update(image_id, result)
    assert evaluator.compute()["segm/AP"] == 0.5 and "no label for the categories [3]" in evaluator.note


def test_per_class_numbers_average_to_the_whole():
    ground_truth, results = small_case()
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    evaluator.update(5, results[5])
    evaluator.update(6, {name: value[:1] for name, value in results[6].items()})
    metrics = evaluator.compute(per_class=True)
    first, second, absent = (metrics[f"segm/AP/{category_id}"] for category_id in CATEGORY_IDS)
    assert absent is None and 0 < second < first < 1 and metrics["segm/AP"] == pytest.approx((first + second) / 2)


def test_inputs_are_not_changed_and_nothing_is_printed(capsys):
    ground_truth, results = small_case()
    before = copy.deepcopy(ground_truth)
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    for image_id, result in results.items():
        evaluator.update(image_id, result)
    assert evaluator.compute() == evaluator.compute()
    assert ground_truth == before and capsys.readouterr().out == ""


def test_ground_truth_may_be_given_already_normalised():
    ground_truth, results = small_case()
    assert evaluate(coco_ground_truth(ground_truth), results)["segm/AP"] == 1.0
