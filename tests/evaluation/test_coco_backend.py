"""Both implementations of COCO's evaluation give the same arrays."""

import gc

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sim_hf.data.masks import encode_rle
from sim_hf.evaluation import coco_matching
from sim_hf.evaluation.coco_backend import collector_paused, precision_and_recall
from sim_hf.evaluation.coco_matching import Instances

CATEGORIES = [{"id": 90, "name": "c"}, {"id": 2, "name": "a"}, {"id": 5, "name": "b"}, {"id": 91, "name": "never"}]
NUM_IMAGES = 8  # the last has nothing


def annotation_of(mask: np.ndarray, number: int, image_id: int, category_id: int, **fields) -> dict:
    rle = encode_rle(mask)
    annotation = {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": rle, "iscrowd": 0}
    annotation |= {"bbox": coco_mask.toBbox(rle).tolist(), "area": float(coco_mask.area(rle))}
    return annotation | fields


def random_annotations(rng: np.random.Generator, count: int, *, scored: bool) -> list[dict]:
    """Rectangles with a notch; crowds, empty masks, areas exactly on the edges of the ranges, scores with ties."""
    annotations = []
    for number in range(1, count + 1):
        mask = np.zeros((120, 150), dtype=bool)
        y, x = rng.integers(0, 100, 2)
        height, width = rng.integers(1, 110, 2)
        if rng.random() < 0.2:
            height = width = rng.choice([32, 96])
        mask[y : y + height, x : x + width] = rng.random() < 0.95
        mask[y, x : x + width // 2] &= rng.random() < 0.5
        fields = {"score": float(rng.choice([0.1, 0.3, 0.5, 0.5, 0.9, rng.random()]))} if scored else {}
        if not scored:
            fields["iscrowd"] = int(rng.random() < 0.1)
        annotations.append(annotation_of(mask, number, int(rng.integers(1, NUM_IMAGES)), int(rng.choice([2, 5, 90])), **fields))
    return annotations


def as_instances(annotations: list[dict], iou_type: str) -> Instances:
    boxes_N4 = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
    areas_N = np.array([a["area"] for a in annotations], float) if iou_type == "segm" else boxes_N4[:, 2] * boxes_N4[:, 3]
    return Instances(
        image_ids_N=np.array([a["image_id"] for a in annotations], int),
        category_ids_N=np.array([a["category_id"] for a in annotations], int),
        boxes_N4=boxes_N4,
        areas_N=areas_N,
        crowd_N=np.zeros(len(annotations), bool),
        scores_N=np.array([a["score"] for a in annotations], float),
        sizes=[a["segmentation"]["size"] for a in annotations],
        counts=[a["segmentation"]["counts"] for a in annotations],
    )


def both(objects, predictions, iou_type, *, image_ids=range(1, NUM_IMAGES + 1), max_detections=(1, 10, 100)):
    """(precision, recall) of each backend."""
    ground_truth = {
        "images": [{"id": i, "height": 120, "width": 150} for i in range(1, NUM_IMAGES + 1)],
        "categories": CATEGORIES,
        "annotations": objects,
    }
    return [
        precision_and_recall(
            ground_truth,
            as_instances(predictions, iou_type),
            iou_type,
            image_ids=list(image_ids),
            max_detections=max_detections,
            backend=backend,
        )
        for backend in ("numpy", "pycocotools")
    ]


def assert_equal(arrays) -> None:
    for fast, reference in zip(*arrays, strict=True):
        np.testing.assert_allclose(fast, reference, rtol=0, atol=1e-15)


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(8))
def test_the_fast_backend_gives_the_arrays_of_pycocotools(iou_type, seed, monkeypatch):
    monkeypatch.setattr(coco_matching, "_PAIRS_AT_A_TIME", 7 if seed % 2 else 1 << 17)
    rng = np.random.default_rng(seed)
    objects = random_annotations(rng, 60, scored=False)
    predictions = random_annotations(rng, 0 if seed == 5 else 200, scored=True)
    near = [{**real, "score": float(rng.choice([0.5, rng.random()]))} for real in objects for _ in range(rng.integers(3))]
    predictions = [*predictions, *near] if seed != 5 else []
    arrays = both(objects, predictions, iou_type)
    assert_equal(arrays)
    assert seed == 5 or ((arrays[0][1] > 0) & (arrays[0][1] < 1)).any()


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_few_images_and_low_limits(iou_type):
    rng = np.random.default_rng(0)
    objects, predictions = random_annotations(rng, 60, scored=False), random_annotations(rng, 300, scored=True)
    for image_ids, max_detections in (([3, 1], (1, 2, 3)), ([NUM_IMAGES], (5,)), (range(2, 6), (1, 1000))):
        assert_equal(both(objects, predictions, iou_type, image_ids=image_ids, max_detections=max_detections))


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_equal_overlaps_and_overlaps_on_a_threshold(iou_type):
    """Two objects in the same place, one of them a crowd or too large to count; the IoU of 1/2 and 3/4 are thresholds."""

    def rectangle(height: int) -> np.ndarray:
        mask = np.zeros((120, 150), dtype=bool)
        mask[:height, :40] = True
        return mask

    for crowd in (0, 1):
        for areas in ((1600, 1600), (1600, 90000), (90000, 1600), (90000, 90000)):
            fields = [{"iscrowd": crowd, "area": areas[0]}, {"iscrowd": 0, "area": areas[1]}]
            objects = [annotation_of(rectangle(40), 1 + k, 1, 2, **each) for k, each in enumerate(fields)]
            predictions = [annotation_of(rectangle(h), k + 1, 1, 2, score=0.9) for k, h in enumerate((20, 30, 40, 80))]
            assert_equal(both(objects, predictions, iou_type))


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_a_thousand_predictions_in_one_place(iou_type):
    """pycocotools' `area` takes no more than 255 masks at once."""
    rng = np.random.default_rng(0)
    objects = [{**each, "image_id": 1, "category_id": 2} for each in random_annotations(rng, 300, scored=False)]
    predictions = [{**each, "image_id": 1, "category_id": 2} for each in random_annotations(rng, 1000, scored=True)]
    assert_equal(both(objects, predictions, iou_type))


def test_the_collector_is_left_as_it_was():
    assert gc.isenabled()
    with pytest.raises(ValueError), collector_paused(), collector_paused():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
