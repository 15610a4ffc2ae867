"""Ground truths with results for them: random ones with everything that COCO allows, and small ones to calculate by hand."""

import random

import numpy as np
import torch
from pycocotools import mask as coco_mask

from sim_hf.evaluation import CocoEvaluator

CATEGORY_IDS = [7, 3, 90]


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


def evaluate(ground_truth: dict, results: dict[int, dict], category_ids=CATEGORY_IDS, **options) -> dict:
    evaluator = CocoEvaluator(ground_truth, category_ids, **options)
    for image_id, result in results.items():
        evaluator.update(image_id, result)
    return evaluator.compute()
