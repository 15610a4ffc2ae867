"""Both implementations of COCO's evaluation give the same arrays."""

import gc
import importlib.util

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sim_hf.evaluation import coco_backend
from sim_hf.evaluation.coco_backend import collector_paused, default_backend, precision_and_recall

needs_faster = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed"
)


def random_annotations(rng: np.random.Generator, count: int, *, scored: bool) -> list[dict]:
    annotations = []
    for number in range(1, count + 1):
        mask = np.zeros((120, 150), dtype=np.uint8, order="F")
        y, x = rng.integers(0, 100, 2)
        height, width = rng.integers(1, 110, 2)
        mask[y : y + height, x : x + width] = 1
        mask[y, x : x + width // 2] = 0
        encoded = coco_mask.encode(mask)
        annotation = {
            "id": number,
            "image_id": int(rng.integers(1, 8)),
            "category_id": int(rng.choice([2, 5, 90])),
            "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
            "bbox": coco_mask.toBbox(encoded).tolist(),
            "area": float(coco_mask.area(encoded)),
            "iscrowd": 0 if scored else int(rng.random() < 0.1),
        }
        if scored:
            annotation["score"] = float(rng.choice([0.1, 0.3, 0.5, 0.5, 0.9, rng.random()]))  # with ties
        annotations.append(annotation)
    return annotations


@needs_faster
@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(6))
def test_the_fast_backend_gives_the_arrays_of_pycocotools(iou_type, seed):
    rng = np.random.default_rng(seed)
    ground_truth = {
        "images": [{"id": i, "height": 120, "width": 150} for i in range(1, 9)],  # the last has nothing
        "categories": [{"id": 2, "name": "a"}, {"id": 5, "name": "b"}, {"id": 90, "name": "c"}, {"id": 91, "name": "never"}],
        "annotations": random_annotations(rng, 60, scored=False),
    }
    predictions = random_annotations(rng, 0 if seed == 5 else 200, scored=True)
    arrays = [
        precision_and_recall(
            ground_truth, predictions, iou_type, image_ids=range(1, 9), max_detections=[1, 10, 100], backend=backend
        )
        for backend in ("faster-coco-eval", "pycocotools")
    ]
    for fast, reference in zip(*arrays, strict=True):
        np.testing.assert_allclose(fast, reference, rtol=1e-12, atol=0)  # pycocotools adds 2e-16 to its denominators


@needs_faster
@pytest.mark.parametrize("seed", range(4))
def test_masks_that_are_compared_with_nothing_need_not_be_read(seed):
    """Few objects: most predictions are in an image without an object of their class, whose masks the fast one leaves out."""
    rng = np.random.default_rng(seed)
    ground_truth = {
        "images": [{"id": i, "height": 120, "width": 150} for i in range(1, 9)],
        "categories": [{"id": 2, "name": "a"}, {"id": 5, "name": "b"}, {"id": 90, "name": "c"}],
        "annotations": random_annotations(rng, 6, scored=False),
    }
    predictions = random_annotations(rng, 200, scored=True)
    found = [{**real, "id": 201 + k, "score": 0.4} for k, real in enumerate(ground_truth["annotations"]) if not real["iscrowd"]]
    predictions += found
    arrays = [
        precision_and_recall(
            ground_truth, predictions, "segm", image_ids=range(1, 9), max_detections=[1, 10, 100], backend=backend
        )
        for backend in ("faster-coco-eval", "pycocotools")
    ]
    for fast, reference in zip(*arrays, strict=True):
        np.testing.assert_allclose(fast, reference, rtol=1e-12, atol=0)
    assert (arrays[0][1] > 0).any()


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


def test_pycocotools_is_what_remains_without_the_fast_backend(monkeypatch):
    monkeypatch.setattr(coco_backend.importlib.util, "find_spec", lambda name: None)
    assert default_backend() == "pycocotools"
