"""The picture of a model card: generated photographs, which belong to nobody, unless the user shows the run's own sheet."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from sim_hf.data.scenes import CLASS_NAMES, render_scene
from sim_hf.evaluation.prediction import evaluating, names_of, predict_images
from sim_hf.visualization import contact_sheet, draw_instances

NUM_SCENES = 3
THRESHOLD = 0.5
SIDE = 400
FIRST_SEED = 7_000_000  # scenes that no data set of `write_scenes` holds
SCENES_TEXT = "Generated photographs, not trained on: the boxes as they are, and what the model finds without them."
SHEET_TEXT = "Validation images: the given boxes, and what the model finds without them."


def scenes_picture(model, processor) -> bytes | None:
    """A JPEG of generated photographs beside the model's instances; None for a model that was not trained on their classes."""
    names = names_of(model)
    if not set(CLASS_NAMES) <= set(names.values()):
        return None
    scenes = [render_scene(FIRST_SEED + number) for number in range(NUM_SCENES)]
    pictures = [Image.fromarray(scene.image) for scene in scenes]
    label_of = {name: label for label, name in names.items()}
    labels = [label_of[name] for name in CLASS_NAMES]
    with evaluating(model):
        results = predict_images(model, processor, pictures, threshold=THRESHOLD, allowed_labels=labels)
    rows: list[list[Image.Image | None]] = []
    for scene, picture, result in zip(scenes, pictures, results, strict=True):
        boxes = torch.as_tensor(scene.boxes).reshape(-1, 4)
        given = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            "labels": torch.tensor([labels[label] for label in scene.class_labels]),
        }
        rows.append([draw_instances(picture, shown, names, side=SIDE) for shown in (given, result)])
    return _jpeg(contact_sheet(rows, titles=["boxes", "prediction"]))


def run_sheet(run: Path) -> bytes | None:
    """The newest sheet of predictions that a run drew, of whatever photographs it was validated on."""
    sheets = sorted((run / "pictures").glob("step-*.jpg"))
    return sheets[-1].read_bytes() if sheets else None


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
