"""CocoEvaluator gives pycocotools' numbers on clean data, and an error or a defined answer where pycocotools goes wrong."""

import contextlib
import copy
import datetime
import io
import json
import os
import random

import numpy as np
import pytest
import torch
from mini_average_precision import summary
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sim_hf.evaluation import CocoEvaluator, coco_ground_truth, from_coco_results, to_coco_results

CATEGORY_IDS = [7, 3, 90]
NUM_CASES = 50
STATS = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
STATS += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]


def rle(mask_HW: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def random_mask(rng: random.Random, height: int, width: int, near: np.ndarray | None = None) -> np.ndarray:
    """A rectangle without one corner; or a shifted copy of another mask. Sizes from a pixel to the whole image."""
    if near is not None:
        return np.roll(near, (rng.choice([0, 0, 1, 3]), rng.choice([0, 0, 1, 2])), axis=(0, 1))
    mask_HW = np.zeros((height, width), dtype=bool)
    y1, x1 = rng.randrange(height), rng.randrange(width)
    y2, x2 = rng.randint(y1 + 1, height), rng.randint(x1 + 1, width)
    mask_HW[y1:y2, x1:x2] = True
    mask_HW[y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = y2 - y1 < 4
    return mask_HW


def random_case(seed: int) -> tuple[dict, dict[int, dict]]:
    """A ground truth with crowds, empty images and a category nobody has, and results with ties and wrong labels."""
    rng = random.Random(seed)
    images, annotations, results = [], [], {}
    for image_id in rng.sample(range(1000), rng.randint(2, 4)):
        height, width = rng.randint(90, 120), rng.randint(90, 120)
        images.append({"id": image_id, "height": height, "width": width, "file_name": "x.jpg"})
        scores, labels, masks = [], [], []
        for _ in range(rng.randint(0, 4)):
            mask_HW, label = random_mask(rng, height, width), rng.randrange(2)
            run_lengths = rle(mask_HW)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[label],
                    "segmentation": run_lengths,
                    "bbox": coco_mask.toBbox(run_lengths).tolist(),
                    "area": float(mask_HW.sum()),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.randint(0, 3)):
                masks.append(random_mask(rng, height, width, mask_HW if rng.random() < 0.8 else None))
                labels.append(label if rng.random() < 0.9 else rng.randrange(3))
                scores.append(rng.choice([0.25, 0.5, rng.random()]))
        results[image_id] = {
            "scores": torch.tensor(scores, dtype=torch.float64),
            "labels": torch.tensor(labels, dtype=torch.long),
            "masks": torch.from_numpy(np.array(masks).reshape(-1, height, width).astype(bool)),
        }
    categories = [{"id": category_id, "name": f"name {category_id}"} for category_id in CATEGORY_IDS]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def evaluate(ground_truth: dict, results: dict[int, dict], category_ids=CATEGORY_IDS, **options) -> dict:
    evaluator = CocoEvaluator(ground_truth, category_ids, **options)
    for image_id, result in results.items():
        evaluator.update(image_id, result)
    return evaluator.compute()


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


def square(x: int, y: int, side: int, size: int = 40) -> np.ndarray:
    mask_HW = np.zeros((size, size), dtype=bool)
    mask_HW[y : y + side, x : x + side] = True
    return mask_HW


def small_case(first_id: int = 1) -> tuple[dict, dict[int, dict]]:
    """Three images with two squares each, and results that find them all, with falling scores."""
    corners = {5: [(0, 0), (20, 20)], 6: [(3, 3), (25, 0)], 7: [(1, 1), (22, 9)]}
    annotations, results = [], {}
    for image_id, places in corners.items():
        masks = [square(x, y, 10 + position) for position, (x, y) in enumerate(places)]
        for position, mask_HW in enumerate(masks):
            x, y = places[position]
            annotations.append(
                {
                    "id": first_id + len(annotations),
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[position],
                    "bbox": [x, y, 10 + position, 10 + position],
                    "segmentation": rle(mask_HW),
                    "area": float(mask_HW.sum()),
                    "iscrowd": 0,
                }
            )
        results[image_id] = {
            "scores": torch.tensor([0.9, 0.8]) - image_id / 100,
            "labels": torch.tensor([0, 1]),
            "masks": torch.from_numpy(np.stack(masks)),
        }
    images = [{"id": image_id, "width": 40, "height": 40} for image_id in corners]
    categories = [{"id": category_id, "name": str(category_id)} for category_id in CATEGORY_IDS]
    return {"images": images, "annotations": annotations, "categories": categories}, results


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


def test_padded_repeat_of_an_image_counts_once():
    ground_truth, results = small_case()
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    for image_id in (5, 6, 7, 5):
        evaluator.update(torch.tensor([image_id]), results[image_id])
    assert len(evaluator.coco_results()) == 6


def test_inputs_are_not_changed_and_nothing_is_printed(capsys):
    ground_truth, results = small_case()
    before = copy.deepcopy(ground_truth)
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    for image_id, result in results.items():
        evaluator.update(image_id, result)
    assert evaluator.compute() == evaluator.compute()
    assert ground_truth == before and capsys.readouterr().out == ""


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


# ---- two processes


def seven_images() -> tuple[dict, dict[int, dict]]:
    annotations, results = [], {}
    for image_id in range(7):
        mask_HW = square(image_id, 2, 10)
        annotations.append({"image_id": image_id, "category_id": 7, "bbox": [image_id, 2, 10, 10], "segmentation": rle(mask_HW)})
        found = [mask_HW, square(20, 20, 8)][: image_id % 3]
        results[image_id] = {
            "scores": torch.tensor([0.5 + image_id / 100, 0.6])[: len(found)],
            "labels": torch.zeros(len(found)),
            "masks": torch.from_numpy(np.array(found).reshape(-1, 40, 40).astype(bool)),
        }
    images = [{"id": image_id, "width": 40, "height": 40} for image_id in range(7)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "a"}]}, results


def evaluate_as_rank(rank: int, folder) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20)
    )
    ground_truth, results = seven_images()
    evaluator = CocoEvaluator(ground_truth, [7])
    # batches of 2, dealt out in turn; the last is filled up with images from the front, as accelerate does
    for image_id in ([0, 1, 4, 5], [2, 3, 6, 0])[rank]:
        evaluator.update(image_id, results[image_id])
    with contextlib.suppress(RuntimeError):
        evaluator.compute()
        raise AssertionError("compute before synchronize must be refused")
    evaluator.synchronize()
    evaluator.synchronize()
    (folder / f"{rank}.json").write_text(json.dumps([evaluator.compute(), evaluator.coco_results(), evaluator.note]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_count_every_image_once_and_agree_with_one(tmp_path):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                evaluate_as_rank(rank, tmp_path)
                os._exit(0)
            except BaseException as error:
                (tmp_path / f"error{rank}").write_text(repr(error))
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("error*")]
    ground_truth, results = seven_images()
    evaluator = CocoEvaluator(ground_truth, [7])
    for image_id, result in results.items():
        evaluator.update(image_id, result)
    expected = [evaluator.compute(), evaluator.coco_results(), evaluator.note]
    assert 0 < expected[0]["segm/AP"] < 1
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_ground_truth_may_be_given_already_normalised():
    ground_truth, results = small_case()
    assert evaluate(coco_ground_truth(ground_truth), results)["segm/AP"] == 1.0
