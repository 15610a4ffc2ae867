"""Generated photographs: the project's own data set, for a first run without any download and for tests.

`render_scene` makes one picture with exact masks and boxes; `write_scenes` makes a data set in COCO's format.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .scenes_render import Scene, render_scene
from .scenes_shapes import CLASS_NAMES

__all__ = ["CATEGORY_IDS", "CLASS_NAMES", "Scene", "render_scene", "write_scenes"]

CATEGORY_IDS: tuple[int, ...] = (3, 7, 11, 18, 42)  # sparse, as COCO's own are: whoever mixes ids and labels up notices
GENERATOR_NAME = "sim_hf.data.scenes"
GENERATOR_VERSION = 2  # raise it whenever the pixels change: written sets of older versions are then made anew
SPLITS = ("train", "val")


def write_scenes(
    folder: str | Path,
    *,
    num_train: int = 400,
    num_val: int = 100,
    seed: int = 0,
    size: int = 256,
    difficulty: float = 1.0,
    progress: bool = True,
) -> Path:
    """Write images/ and instances_{train,val}.json into `folder` and return it; an equal set that is there is kept.

    Scene i of a split depends on (seed, split, i): a larger set begins with the smaller one. A folder that holds
    annotations of another origin is refused; an older set of this generator is replaced.
    """
    folder = Path(folder)
    counts = {"train": num_train, "val": num_val}
    for split, count in counts.items():
        if count < 0:
            raise ValueError(f"num_{split} must not be negative, got {count}")
    stamp = {
        "generator": GENERATOR_NAME,
        "version": GENERATOR_VERSION,
        **{f"num_{split}": count for split, count in counts.items()},
        "seed": seed,
        "size": size,
        "difficulty": float(difficulty),
    }
    if _is_complete(folder, stamp):
        return folder
    _remove_old_set(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(counts.values()), desc="generated photographs", unit="image", disable=not progress)
    documents = {}
    with bar:
        for split in SPLITS:
            documents[split] = _write_split(folder, split, counts[split], seed, size, difficulty, stamp, bar)
    for split, document in documents.items():  # last: a broken-off run leaves no set that looks whole
        _write_json(folder / f"instances_{split}.json", document)
    return folder


def _write_split(folder: Path, split: str, count: int, seed: int, size: int, difficulty: float, stamp: dict, bar: tqdm) -> dict:
    """Write the images of one split -> its COCO document."""
    images, annotations = [], []
    split_number = SPLITS.index(split)
    for index in range(count):
        scene = render_scene((seed, split_number, index), size=size, difficulty=difficulty)
        image_id, file_name = split_number * 1_000_000 + index + 1, f"{split}_{index:06d}.jpg"
        Image.fromarray(scene.image).save(folder / "images" / file_name, quality=scene.jpeg_quality)
        height, width, _ = scene.image.shape
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for annotation in _annotations(scene):
            annotation_id = split_number * 10_000_000 + len(annotations) + 1
            annotations.append({"id": annotation_id, "image_id": image_id, **annotation})
        bar.update()
    categories = [
        {"id": category_id, "name": name, "supercategory": "generated"}
        for category_id, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
    ]
    info = {"description": "Generated photographs with exact boxes and masks", **stamp}
    return {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def _annotations(scene: Scene) -> list[dict]:
    """COCO annotations of a scene, without ids."""
    annotations = []
    for mask, box, class_label in zip(scene.masks, scene.boxes, scene.class_labels, strict=True):
        run_lengths = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        annotations.append(
            {
                "category_id": CATEGORY_IDS[class_label],
                "bbox": [float(value) for value in box],
                "area": float(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": list(mask.shape), "counts": run_lengths["counts"].decode("ascii")},
            }
        )
    return annotations


def _read_document(path: Path) -> dict | None:
    """A COCO document of this generator, None when there is no file."""
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        foreign = document["info"]["generator"] != GENERATOR_NAME
    except (json.JSONDecodeError, KeyError, TypeError):
        foreign = True
    if foreign:
        raise ValueError(f"{path} was not written by {GENERATOR_NAME}; expected an empty folder or a generated set")
    return document


def _is_complete(folder: Path, stamp: dict) -> bool:
    for split in SPLITS:
        document = _read_document(folder / f"instances_{split}.json")
        if document is None or any(document["info"].get(key) != value for key, value in stamp.items()):
            return False
        if not all((folder / "images" / image["file_name"]).is_file() for image in document["images"]):
            return False
    return True


def _remove_old_set(folder: Path) -> None:
    """Remove the files that an earlier call wrote, and nothing else."""
    for split in SPLITS:
        path = folder / f"instances_{split}.json"
        document = _read_document(path)
        if document is None:
            continue
        path.unlink()
        for image in document["images"]:
            (folder / "images" / image["file_name"]).unlink(missing_ok=True)


def _write_json(path: Path, document: dict) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document), encoding="utf-8")
    os.replace(unfinished, path)
