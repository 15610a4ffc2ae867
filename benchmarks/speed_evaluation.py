"""COCO evaluation beside pycocotools: the same annotation file and the same results to all 24 numbers, masks and boxes.

The objects are polygons, some of them crowds as run lengths; the predictions are run lengths, some near an object, most of
them not, a hundred an image as evaluation gives them. All are drawn from a seed, before the clock runs.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from measuring import Row, compare
from sim_hf.data import write_coco
from sim_hf.evaluation import CocoEvaluator

HEIGHT, WIDTH = 480, 640
NUM_CATEGORIES = 80
NUM_CORNERS = 14
CROWD_SHARE = 0.01
FOUND_SHARE = 0.75  # of the objects that have a prediction near them
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def evaluation_rows(
    repeats: int,
    data: Path | None = None,
    *,
    num_images: int = 5000,
    num_objects: int = 36_000,
    detections: int = 100,
) -> list[Row]:
    """One row, masks and boxes together. data: taken as the other rows do, not used."""
    with tempfile.TemporaryDirectory() as folder:
        problem = generate(Path(folder), num_images, num_objects, detections)
        ours = Ours(problem)
        theirs = pycocotools_numbers(problem)
        mine = ours.numbers()
        row = compare(
            f"COCO evaluation, {num_images} images, {num_objects} objects, {detections} detections",
            "pycocotools: COCO, loadRes, COCOeval for masks and for boxes",
            ours.numbers,
            lambda: pycocotools_numbers(problem),
            equal=same_numbers(mine, theirs),
            goal=0.25,
            repeats=repeats,
        )
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in ours.parts.items())
    row.note = f"equal: all 24 numbers to 1e-9; ours, last time: {parts}"
    return [row]


@dataclass
class Problem:
    """An annotation file, and per image id the results as `CocoEvaluator.update` takes them and as COCO has them."""

    annotation_file: Path
    by_image: dict[int, dict[str, Any]]
    coco_results: list[dict[str, Any]]


class Ours:
    """From the same results to the numbers. `parts`: seconds of each part, the last time."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.parts: dict[str, float] = {}

    def numbers(self) -> list[float]:
        start = time.perf_counter()
        evaluator = CocoEvaluator(self.problem.annotation_file, range(1, NUM_CATEGORIES + 1))
        read = time.perf_counter()
        for image_id, result in self.problem.by_image.items():
            evaluator.update(image_id, result)
        collected = time.perf_counter()
        metrics = evaluator.compute()
        self.parts = {"annotations": read - start, "results": collected - read, "numbers": time.perf_counter() - collected}
        values = [metrics[f"{kind}/{name}"] for kind in ("segm", "bbox") for name in NUMBERS]
        return [-1.0 if value is None else value for value in values]  # pycocotools writes -1 for nothing to measure


def pycocotools_numbers(problem: Problem) -> list[float]:
    """loadRes takes the area from the box where there is one: masks without boxes, boxes without masks."""
    numbers: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO(str(problem.annotation_file))
        for kind, left_out in (("segm", "bbox"), ("bbox", "segmentation")):
            results = [{key: value for key, value in result.items() if key != left_out} for result in problem.coco_results]
            evaluation = COCOeval(real, real.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers += evaluation.stats.tolist()
    return numbers


def same_numbers(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) == len(theirs) == 2 * len(NUMBERS) and bool(np.allclose(ours, theirs, rtol=0, atol=1e-9))


def generate(folder: Path, num_images: int, num_objects: int, detections: int, seed: int = 0) -> Problem:
    """A problem of this size; the numbers it gives are neither 0 nor 1."""
    random = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    by_image: dict[int, dict[str, Any]] = {}
    counts = random.multinomial(num_objects, np.full(num_images, 1 / num_images))
    for image_id, count in enumerate(counts.tolist(), start=1):
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": HEIGHT, "width": WIDTH})
        objects = Blobs.draw(random, count)
        labels = random.integers(NUM_CATEGORIES, size=count)
        annotations += _annotations(random, image_id, objects, labels, first_id=len(annotations) + 1)
        predicted, predicted_labels, scores = _predictions(random, objects, labels, detections)
        rles = predicted.run_lengths()
        by_image[image_id] = {
            "scores": torch.from_numpy(scores),
            "labels": torch.from_numpy(predicted_labels),
            "rles": rles,
        }
        for score, label, rle in zip(scores.tolist(), predicted_labels.tolist(), rles, strict=True):
            result = {"image_id": image_id, "category_id": label + 1, "score": score, "segmentation": rle}
            results.append({**result, "bbox": coco_mask.toBbox(rle).tolist()})
    categories = [{"id": label + 1, "name": f"class {label}"} for label in range(NUM_CATEGORIES)]
    annotation_file = folder / "instances.json"
    write_coco(annotation_file, {"images": images, "annotations": annotations, "categories": categories})
    return Problem(annotation_file, by_image, results)


@dataclass
class Blobs:
    """Wavy ellipses. Shape letters: n blobs, 2 x and y, 3 waves."""

    centers_n2: np.ndarray
    radii_n2: np.ndarray
    waves_n3: np.ndarray

    @staticmethod
    def draw(random: np.random.Generator, count: int) -> Blobs:
        sides = np.exp(random.uniform(np.log(8), np.log(300), count))  # small, medium and large as in COCO, about
        aspect = np.exp(random.uniform(-0.5, 0.5, count))
        radii_n2 = np.stack([sides * aspect, sides / aspect], -1) / 2
        return Blobs(random.uniform((0, 0), (WIDTH, HEIGHT), (count, 2)), radii_n2, random.normal(0, 0.06, (count, 3)))

    def polygons(self) -> list[list[float]]:
        angles = np.linspace(0, 2 * np.pi, NUM_CORNERS, endpoint=False)
        waves = 1 + self.waves_n3 @ np.stack([np.cos(angles), np.sin(2 * angles), np.cos(3 * angles)])
        corners = self.centers_n2[:, None] + self.radii_n2[:, None] * waves[..., None] * np.stack(
            [np.cos(angles), np.sin(angles)], -1
        )
        return corners.clip((0, 0), (WIDTH, HEIGHT)).round(2).reshape(len(corners), 2 * corners.shape[1]).tolist()

    def run_lengths(self) -> list[dict[str, Any]]:
        polygons = self.polygons()
        if not polygons:
            return []
        rles = coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)
        return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in rles]

    def moved(self, random: np.random.Generator) -> Blobs:
        """Each a little elsewhere and of a slightly other shape."""
        amount = random.uniform(0, 0.15, (len(self.centers_n2), 1))
        shift = random.normal(size=self.centers_n2.shape) * amount * self.radii_n2
        scale = np.exp(random.normal(size=self.radii_n2.shape) * amount)
        return Blobs(self.centers_n2 + shift, self.radii_n2 * scale, self.waves_n3 + random.normal(0, 0.03, self.waves_n3.shape))


def _annotations(
    random: np.random.Generator, image_id: int, objects: Blobs, labels: np.ndarray, first_id: int
) -> list[dict[str, Any]]:
    annotations = []
    for position, (polygon, rle) in enumerate(zip(objects.polygons(), objects.run_lengths(), strict=True)):
        crowd = int(random.uniform() < CROWD_SHARE)
        annotation = {"id": first_id + position, "image_id": image_id, "category_id": int(labels[position]) + 1, "iscrowd": crowd}
        annotation |= {"bbox": coco_mask.toBbox(rle).tolist(), "area": float(coco_mask.area(rle))}
        annotations.append({**annotation, "segmentation": rle if crowd else [polygon]})
    return annotations


def _predictions(
    random: np.random.Generator, objects: Blobs, labels: np.ndarray, detections: int
) -> tuple[Blobs, np.ndarray, np.ndarray]:
    """-> blobs, labels and scores, best first."""
    near, found = objects.moved(random), np.nonzero(random.uniform(size=len(labels)) < FOUND_SHARE)[0][:detections]
    other = Blobs.draw(random, detections - len(found))
    joined = [
        np.concatenate([mine[found], new])
        for mine, new in (
            (near.centers_n2, other.centers_n2),
            (near.radii_n2, other.radii_n2),
            (near.waves_n3, other.waves_n3),
        )
    ]
    # Predictions elsewhere mostly share a class with the objects of the image, as a network's do.
    pool = np.concatenate([labels, random.integers(NUM_CATEGORIES, size=4)])
    all_labels = np.concatenate([labels[found], random.choice(pool, size=detections - len(found))])
    scores = np.concatenate([random.beta(4, 2, len(found)), random.beta(1, 6, detections - len(found))])
    order = np.argsort(-scores, kind="stable")
    return Blobs(*(values[order] for values in joined)), all_labels[order], scores[order]
