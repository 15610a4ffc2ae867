"""A COCO file with boxes in, the same file with masks out: sharded, resumable, nothing else changed.

Each process appends the masks of an image to its own `OUTPUT.partial-<rank>.jsonl` as soon as they are made; a call that was
interrupted goes on from these files, and the finished document replaces OUTPUT in one move.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from sim_hf.data import AnnotationError, decode_segmentation, encode_rle, read_image, validate_coco, write_coco
from sim_hf.data.polygons import mask_polygons
from sim_hf.evaluation.prediction import names_of
from sim_hf.labeling import Labeller, LabelOptions, network_labeller
from sim_hf.models.architectures import load_model
from sim_hf.models.sim import SIMImageProcessor
from sim_hf.processes import process_state
from sim_hf.promptable_segmenter import PromptableSegmenter, is_promptable
from sim_hf.visualization import draw_instances

logger = logging.getLogger(__name__)
NUM_PICTURES = 24


@dataclass
class LabelJob:
    """What `sim-hf label` was asked for; the fields are its options."""

    model: str
    annotations: Path
    images: Path
    output: Path
    polygons: bool = False
    keep_masks: bool = False
    restart: bool = False
    crop_below: float = LabelOptions.crop_below
    crop_margins: tuple[float, ...] = LabelOptions.crop_margins
    box_format: str = "xywh"
    batch_size: int = 8
    pictures: Path | None = None


def label_file(job: LabelJob) -> dict[str, Any]:
    """Label the file -> a summary: number of boxes, mean confidence and, where the file had real masks, the mean IoU of the
    new masks and of the filled boxes with them."""
    state = process_state()
    if job.output.resolve() == job.annotations.resolve():
        raise ValueError(f"--output {job.output} is the input file; choose another name, the boxes' file stays untouched")
    report = validate_coco(job.annotations, job.images, box_format=job.box_format)
    if not report.ok:
        raise AnnotationError(f"{job.annotations} cannot be used as it is; `sim-hf check` shows every fault:\n{report}")
    document = orjson.loads(job.annotations.read_bytes())
    work = _work_list(document, job)
    partial = job.output.with_name(f"{job.output.name}.partial-{state.process_index}.jsonl")
    job.output.parent.mkdir(parents=True, exist_ok=True)
    identity = _identity(job)
    if job.restart and state.is_main_process:
        for old in _partials(job.output):
            old.unlink()
    state.wait_for_everyone()
    done = {record["image_id"] for record in _read_partials(job.output, identity)}
    if done and state.is_main_process:
        logger.warning("going on with an interrupted call: %d images are labelled already (--restart forgets them)", len(done))
    mine = [entry for entry in work[state.process_index :: state.num_processes] if entry["image"]["id"] not in done]
    _label_images(job, document, mine, partial, identity, state)
    state.wait_for_everyone()
    summary: dict[str, Any] = {}
    if state.is_main_process:
        records = list(_read_partials(job.output, identity))
        summary = _finish(job, document, work, records)
        for old in _partials(job.output):
            old.unlink()
    state.wait_for_everyone()
    return summary


def _work_list(document: dict, job: LabelJob) -> list[dict]:
    """Images with the annotations that get a mask: not crowds, with a usable box, and without a mask if those are kept."""
    by_image = defaultdict(list)
    for annotation in document["annotations"]:
        if annotation.get("iscrowd") or (job.keep_masks and annotation.get("segmentation")):
            continue
        x, y, w, h = annotation["bbox"]
        if job.box_format == "xyxy":
            w, h = w - x, h - y
        if w > 0 and h > 0:
            by_image[annotation["image_id"]].append((annotation, [x, y, x + w, y + h]))
    return [{"image": image, "boxes": by_image[image["id"]]} for image in document["images"] if by_image[image["id"]]]


def _label_images(job: LabelJob, document: dict, mine: list[dict], partial: Path, identity: str, state: PartialState) -> None:
    assert state.device is not None  # process_state sets it
    labeller, names = _labeller(job, document, state.device)
    label_of = _labels_by_category(document, names)
    bar = tqdm(mine, desc="label", unit="image", disable=not state.is_local_main_process)
    with partial.open("a", encoding="utf-8") as file:
        for number, entry in enumerate(bar):
            image = entry["image"]
            picture = read_image(job.images / image["file_name"])
            boxes_n4 = torch.tensor([box for _, box in entry["boxes"]], dtype=torch.float32)
            labels = [label_of.get(annotation["category_id"]) for annotation, _ in entry["boxes"]]
            found = labeller(picture, boxes_n4, labels)
            masks = [found.mask(i).numpy() for i in range(len(found))]
            record = {
                "identity": identity,
                "image_id": image["id"],
                "annotation_ids": [annotation["id"] for annotation, _ in entry["boxes"]],
                "masks": [encode_rle(mask) for mask in masks],
                "confidence": [round(float(value), 4) for value in found.confidence_n],
            }
            file.write(json.dumps(record) + "\n")
            file.flush()
            if job.pictures is not None and number < NUM_PICTURES:
                _draw(job.pictures, image, picture, boxes_n4, labels, found.masks(), names)


def _labeller(job: LabelJob, document: dict, device: torch.device) -> tuple[Labeller, dict[int, str]]:
    """Who makes the masks, and its classes by label; a promptable segmenter has none and takes the file's."""
    if is_promptable(job.model):
        names = {number: category["name"] for number, category in enumerate(document["categories"])}
        return PromptableSegmenter.from_pretrained(job.model, device).masks_for_boxes, names
    model = load_model(job.model, dtype=torch.float32)
    model.to(device)
    processor = SIMImageProcessor.from_pretrained(job.model)
    options = LabelOptions(batch_size=job.batch_size, crop_below=job.crop_below, crop_margins=job.crop_margins)
    return network_labeller(model, processor, options), names_of(model)


def _labels_by_category(document: dict, id2label: dict[int, str]) -> dict[int, int]:
    """Category id of the file -> label of the model, for the classes that both name."""
    by_name = {name.casefold(): int(label) for label, name in id2label.items()}
    known = {c["id"]: by_name[c["name"].casefold()] for c in document["categories"] if c["name"].casefold() in by_name}
    unknown = sorted(c["name"] for c in document["categories"] if c["id"] not in known)
    if unknown:
        logger.warning("classes that the model does not know, labelled by their boxes alone: %s", ", ".join(unknown[:12]))
    return known


def _draw(folder: Path, image: dict, picture, boxes_n4, labels, masks_nHW, id2label) -> None:
    names = {**id2label, -1: "object"}
    shown = {"boxes": boxes_n4, "labels": torch.tensor([-1 if label is None else label for label in labels]), "masks": masks_nHW}
    folder.mkdir(parents=True, exist_ok=True)
    draw_instances(picture, shown, names).save(folder / f"{Path(image['file_name']).stem}.jpg", quality=90)


def _identity(job: LabelJob) -> str:
    """What the partial results depend on: another file, model or option must not go on with them."""
    content = hashlib.sha256(job.annotations.read_bytes()).hexdigest()
    settings = f"{content} {job.model} {job.crop_below} {job.crop_margins} {job.keep_masks} {job.box_format}"
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _partials(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{output.name}.partial-*.jsonl"))


def _read_partials(output: Path, identity: str) -> Iterator[dict]:
    """The finished images of an interrupted call of the same job; a line cut short by a crash is dropped."""
    for path in _partials(output):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["identity"] == identity:
                yield record


def _finish(job: LabelJob, document: dict, work: list[dict], records: list[dict]) -> dict[str, Any]:
    """Put the masks into the document, write it, and say how good they are."""
    found = {
        (record["image_id"], annotation_id): (mask, confidence)
        for record in records
        for annotation_id, mask, confidence in zip(record["annotation_ids"], record["masks"], record["confidence"], strict=True)
    }
    comparison: list[tuple[float, float]] = []
    for entry in work:
        size = None
        for annotation, box in entry["boxes"]:
            rle, confidence = found[entry["image"]["id"], annotation["id"]]
            size = rle["size"]
            mask = decode_segmentation(json.dumps(rle), *size, annotation_id=annotation["id"])
            real = annotation.get("segmentation")
            if real:
                comparison.append(_compare(real, mask, box, annotation["id"]))
            annotation["segmentation"] = mask_polygons(mask) if job.polygons else rle
            annotation["area"] = float(mask.sum())
            annotation["score"] = confidence
    write_coco(job.output, document)
    confidences = [confidence for _, confidence in found.values()]
    summary: dict[str, Any] = {
        "boxes": len(found),
        "images": len(work),
        "mean_confidence": float(np.mean(confidences)) if confidences else None,
    }
    print(f"{len(found)} boxes of {len(work)} images -> {job.output}")
    if confidences:
        doubtful = sum(value < 0.5 for value in confidences)
        print(f"mean confidence {summary['mean_confidence']:.3f}; {doubtful} below 0.5 (field `score`), worth a look")
    if comparison:
        ours, filled = np.array(comparison).T
        summary |= {
            "mean_iou": float(ours.mean()),
            "filled_box_iou": float(filled.mean()),
            "improved": float((ours > filled).mean()),
        }
        print(
            f"against the {len(ours)} real masks of the file: mean IoU {ours.mean():.3f} (boxes filled in: {filled.mean():.3f}), "
            f"better than the filled box for {100 * (ours > filled).mean():.0f} % of the boxes"
        )
    return summary


def _compare(real: Any, mask: np.ndarray, box: list[float], annotation_id: int) -> tuple[float, float]:
    """IoU with the real mask of the new mask, and of the box filled in."""
    height, width = mask.shape
    truth = decode_segmentation(json.dumps(real), height, width, annotation_id=annotation_id)
    x1, y1, x2, y2 = (round(value) for value in box)
    filled = np.zeros_like(truth)
    filled[max(y1, 0) : max(y2, y1 + 1), max(x1, 0) : max(x2, x1 + 1)] = True

    def iou(candidate: np.ndarray) -> float:
        return float((candidate & truth).sum() / max((candidate | truth).sum(), 1))

    return iou(mask), iou(filled)
