"""pycocotools, torchvision and Pillow under the faults of data."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.datasets import CocoDetection
from transformers import Mask2FormerImageProcessor
from transformers.utils import ModelOutput

from coco_faults import ALL_FAULTS, sound_document
from coco_faults.faults import BOX_FAULTS, ID_FAULTS, TEXT_FAULTS


def _accepted(folder: Path, faults) -> str:
    """What `COCO(file)` says to files that must be refused or repaired."""
    silent, errors = 0, Counter()
    wrong = [fault for fault in faults if fault.verdict != "noted"]
    for fault in wrong:
        (folder / "a.json").write_bytes(fault.content)
        try:
            COCO(folder / "a.json")
            silent += 1
        except BaseException as error:
            errors[type(error).__name__] += 1
    named = ", ".join(f"{name} {count}" for name, count in sorted(errors.items()))
    return f"pycocotools reads {silent} of {len(wrong)} faulty files without a word" + (f" (else {named})" if named else "")


def corners(folder: Path) -> str:
    fault = next(fault for fault in ALL_FAULTS if fault.name == "corners-for-sizes")
    (folder / "a.json").write_bytes(fault.content)
    return f"pycocotools reads {len(COCO(folder / 'a.json').anns)} of {fault.count} corner boxes as sizes, without a word"


def turned_photograph(folder: Path) -> str:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 100)).save(folder / "1.png", exif=exif)  # upright it is 100 x 80, as the annotations say
    (folder / "a.json").write_text(json.dumps(sound_document()))
    picture, _ = CocoDetection(folder, folder / "a.json")[0]
    return f"torchvision's CocoDetection gives {picture.size} for a photograph that is annotated as (100, 80)"


_TRUTH = ((10, 20, 30, 40), (50, 10, 20, 30))


def _average_precision(ids, scores=(0.9, 0.8), boxes=_TRUTH, truth=_TRUTH) -> str:
    images, categories = [{"id": 1, "width": 100, "height": 80}], [{"id": 1, "name": "a"}]
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for number, box in zip(ids, truth, strict=True)
    ]
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    coco.createIndex()
    results = [
        {"image_id": 1, "category_id": 1, "bbox": list(box), "score": score} for box, score in zip(boxes, scores, strict=True)
    ]
    try:
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return f"{evaluation.stats[0]:.3f}"
    except Exception as error:
        return type(error).__name__


def order_of_equals(folder: Path) -> str:
    found = [_average_precision((1,), (0.9, 0.9), boxes, _TRUTH[:1]) for boxes in (_TRUTH, _TRUTH[::-1])]
    return f"pycocotools gives an AP of {found[0]} or {found[1]} for two predictions of one score, by their place in the list"


def evaluation_traps(folder: Path) -> str:
    nan = float("nan")
    cases = {
        "ids from 0": _average_precision((0, 1)),
        "ids twice": _average_precision((1, 1)),
        "NaN boxes": _average_precision((1, 2), boxes=((nan,) * 4,) * 2),
        "no predictions": _average_precision((1, 2), scores=(), boxes=()),
    }
    return "pycocotools' box AP of perfect predictions (NaN boxes: of none): " + ", ".join(f"{k} {v}" for k, v in cases.items())


def deep_ramp(folder: Path) -> str:
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(folder / "a.png")
    levels = len(np.unique(np.asarray(Image.open(folder / "a.png").convert("RGB"))[..., 0]))
    return f"Pillow's `convert('RGB')` leaves {levels} gray levels of a 16-bit ramp"


def half_a_picture(folder: Path) -> str:
    noise = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg")
    content = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2])
    try:
        Image.open(folder / "a.jpg").verify()
    except Exception as error:
        return f"Pillow's `verify()` finds half a JPEG ({type(error).__name__})"
    return "Pillow's `verify()` passes half a JPEG; it fails in the middle of training"


def bad_segmentations(folder: Path) -> str:
    found = []
    for name, fields in (("empty", {"segmentation": []}), ("missing", {})):
        document = sound_document()
        document["annotations"][0].pop("segmentation")
        document["annotations"][0].update(fields)
        coco = COCO()
        coco.dataset = document
        coco.createIndex()
        try:
            coco.annToMask(document["annotations"][0])
            found.append(f"{name}: a mask")
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}")
    return f"pycocotools' `annToMask`, which names no annotation: {', '.join(found)}"


def path_that_leaves(folder: Path) -> str:
    (folder / "images").mkdir()
    Image.new("RGB", (100, 80)).save(folder / "secret.png")
    document = sound_document()
    document["images"][0]["file_name"] = "../secret.png"
    (folder / "a.json").write_text(json.dumps(document))
    try:
        CocoDetection(folder / "images", folder / "a.json")[0]
    except Exception as error:
        return f"torchvision's CocoDetection refuses ../secret.png ({type(error).__name__})"
    return "torchvision's CocoDetection opens ../secret.png outside the image folder"


def bomb(folder: Path) -> str:
    Image.new("1", (13_000, 13_000)).save(folder / "a.png")
    size = (folder / "a.png").stat().st_size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = Image.open(folder / "a.png")
    said = "with a warning" if caught else "without a word"
    return f"Pillow opens {size / 1000:.0f} kB that unfold into {3 * picture.width * picture.height / 1e6:.0f} MB, {said}"


def overlapping_instances(folder: Path) -> str:
    masks_1QHW = torch.full((1, 2, 96, 96), -9.0)
    masks_1QHW[0, 0, :, :64] = masks_1QHW[0, 1, :, 32:] = 9.0
    outputs = ModelOutput(masks_queries_logits=masks_1QHW, class_queries_logits=torch.tensor([[[9.0, 0.0], [8.0, 0.0]]]))
    processor = Mask2FormerImageProcessor()
    (result,) = processor.post_process_instance_segmentation(outputs, threshold=0.5, target_sizes=[(96, 96)])
    kept = [int((result["segmentation"] == segment["id"]).sum()) for segment in result["segments_info"]]
    return f"transformers' post-processing leaves {kept} pixels of two instances that have {64 * 96} each, in one map"


MEASUREMENTS = {
    10: corners,
    11: turned_photograph,
    12: order_of_equals,
    13: evaluation_traps,
    15: deep_ramp,
    20: lambda folder: _accepted(folder, BOX_FAULTS),
    21: lambda folder: _accepted(folder, ID_FAULTS),
    22: half_a_picture,
    23: lambda folder: _accepted(folder, TEXT_FAULTS),
    24: bad_segmentations,
    30: path_that_leaves,
    33: bomb,
    36: overlapping_instances,
}
