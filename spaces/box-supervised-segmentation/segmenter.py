"""From an uploaded picture to instances: with the network alone, or in given boxes; and from instances to what is shown.

Everything of a request is in its `Found`; nothing of one visitor stays in the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from boxes import NamedBox, boxes_inside
from sim_hf import SIMImageProcessor, draw_instances, load_model
from sim_hf.data import decode_segmentation, encode_rle
from sim_hf.evaluation.prediction import predict_images
from sim_hf.labeling import masks_for_boxes
from sim_hf.visualization import PALETTE
from uploads import Upload

MIN_SCORE, MAX_INSTANCES = 0.05, 100  # as many as COCO counts
_SHOWN_SIDE = 1280
_SAME_OBJECT = 0.8  # IoU of two masks
_LOOKED_AT = 4  # every so many pixels of a mask, in both directions
_TEXT_SHARE = 1 / 28  # names stay readable where a phone shows the picture at a third of its size
_UNNAMED = "object"
_SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "sim-tiny"


@dataclass(frozen=True)
class Found:
    """Instances of a picture: the best first, or in the order of the boxes. annotations: COCO's, in pixels of what was sent;
    boxes_n4 (xyxy) and masks (run lengths): the same instances in pixels of `upload.picture`."""

    upload: Upload
    annotations: list[dict[str, Any]]
    names: list[str]
    boxes_n4: Tensor
    masks: list[dict[str, Any]]
    seconds: float

    def count(self, least_score: float = 0.0) -> int:
        return sum(annotation["score"] >= least_score for annotation in self.annotations)

    def drawn(self, least_score: float = 0.0) -> Image.Image:
        size = self.upload.picture.height, self.upload.picture.width
        shown = self.count(least_score)
        result = {
            "scores": torch.tensor([annotation["score"] for annotation in self.annotations[:shown]]),
            "labels": torch.arange(shown),
            "boxes": self.boxes_n4[:shown],
            "masks": [torch.from_numpy(decode_segmentation(mask, *size)) for mask in self.masks[:shown]],
        }
        side = min(max(640, *size), _SHOWN_SIDE)
        return draw_instances(
            self.upload.picture,
            result,
            dict(enumerate(self.names)),
            max_instances=shown,
            side=side,
            text_size=round(side * _TEXT_SHARE),
        )

    def table(self, least_score: float = 0.0) -> list[list[Any]]:
        """(colour as #rrggbb, label, score, area in pixels) of each instance."""
        shown = list(zip(self.annotations, self.names, strict=True))[: self.count(least_score)]
        return [
            ["#{:02x}{:02x}{:02x}".format(*PALETTE[row % len(PALETTE)]), name, round(a["score"], 2), int(a["area"])]
            for row, (a, name) in enumerate(shown)
        ]

    def coco(self, least_score: float = 0.0) -> dict[str, Any]:
        """A COCO document of this one image; `score` is added to each annotation, and its categories are those it uses."""
        shown = self.count(least_score)
        height, width = self.upload.size
        used = {a["category_id"]: name for a, name in zip(self.annotations[:shown], self.names, strict=False)}
        return {
            "images": [{"id": 1, "file_name": self.upload.file_name, "width": width, "height": height}],
            "categories": [{"id": category_id, "name": name} for category_id, name in sorted(used.items())],
            "annotations": self.annotations[:shown],
        }


class Segmenter:
    """A trained model. `find` asks it for the objects of a picture, `fill` for the masks in given boxes."""

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        source: dict[str, Any] = {} if revision is None else {"revision": revision}
        self.model = load_model(model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **source).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = SIMImageProcessor.from_pretrained(model, **source)
        self.names: dict[int, str] = {int(label): name for label, name in self.model.config.id2label.items()}
        ids = self.model.config.category_ids or range(len(self.names))
        self.category_ids = {name: int(ids[label]) for label, name in self.names.items()}

    def find(self, upload: Upload) -> Found:
        """Every object that the network gives a score of at least MIN_SCORE, the MAX_INSTANCES best of them, each once."""
        start = time.perf_counter()
        (result,) = predict_images(self.model, self.processor, [upload.picture], threshold=MIN_SCORE, max_instances=MAX_INSTANCES)
        rows = distinct(result["masks"], result["scores"].tolist())
        names = [self.names[int(result["labels"][row])] for row in rows]
        masks = (result["masks"][row] for row in rows)
        return self._found(upload, names, result["scores"][rows].tolist(), result["boxes"][rows], masks, start)

    def fill(self, upload: Upload, boxes: Sequence[NamedBox], name: str = "") -> Found:
        """One mask for each box, in their order. name: what is in boxes that have no name of their own."""
        start = time.perf_counter()
        boxes = boxes_inside(list(boxes), upload.size)
        label_of = {known.casefold(): label for label, known in self.names.items()}
        said = [box.name or name for box in boxes]
        labels = [label_of.get(name.casefold()) for name in said]
        names = [name if label is None else self.names[label] for name, label in zip(said, labels, strict=True)]
        boxes_n4 = torch.tensor([box.corners() for box in boxes]) * upload.scale
        found = masks_for_boxes(self.model, self.processor, upload.picture, boxes_n4, labels)
        masks = (found.mask(row) for row in range(len(found)))
        named = [name or _UNNAMED for name in names]
        return self._found(upload, named, found.confidence_n.tolist(), boxes_n4, masks, start)

    def _found(self, upload: Upload, names: list[str], scores: list[float], boxes_n4: Tensor, masks, start: float) -> Found:
        category_ids = self._category_ids(names)
        annotations, shown = [], []
        for row, mask_HW in enumerate(masks):
            mask_HW = mask_HW.numpy()
            shown.append(encode_rle(mask_HW))
            segmentation, area = _at_size(mask_HW, upload.size)
            x1, y1, x2, y2 = (boxes_n4[row] / upload.scale).tolist()
            annotations.append(
                {
                    "id": row + 1,
                    "image_id": 1,
                    "category_id": category_ids[names[row]],
                    "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "area": area,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                    "score": round(scores[row], 4),
                }
            )
        return Found(upload, annotations, names, boxes_n4, shown, time.perf_counter() - start)

    def _category_ids(self, names: list[str]) -> dict[str, int]:
        """The model's ids for the classes that it knows, new ones for the others."""
        unknown = sorted(set(names) - set(self.category_ids))
        first = max(self.category_ids.values()) + 1
        return self.category_ids | {name: first + place for place, name in enumerate(unknown)}


def distinct(masks, scores: Sequence[float]) -> list[int]:
    """Rows from the best score down, without those whose mask is nearly that of a better one: the same object under another
    name, or found twice."""
    kept: list[tuple[int, Tensor]] = []
    for row in sorted(range(len(scores)), key=lambda row: -scores[row]):
        mask_hw = masks[row][::_LOOKED_AT, ::_LOOKED_AT].bool()
        overlaps = ((int((mask_hw & other_hw).sum()), int((mask_hw | other_hw).sum())) for _, other_hw in kept)
        if all(both < _SAME_OBJECT * max(either, 1) for both, either in overlaps):
            kept.append((row, mask_hw))
    return [row for row, _ in kept]


def load_segmenter() -> Segmenter:
    """The model that SIM_MODEL names (a folder or a Hub id, at SIM_REVISION), else the checkpoint that comes with sim_hf."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    name, revision = os.environ.get("SIM_MODEL"), os.environ.get("SIM_REVISION")
    if not name and not _SHIPPED.is_dir():
        raise SystemExit("Which model? Set SIM_MODEL to a Hub id (and SIM_REVISION to a commit of it) or to a folder.")
    try:
        return Segmenter(name or _SHIPPED, revision)
    except (OSError, ValueError) as error:
        raise SystemExit(f"SIM_MODEL={name}: this model cannot be loaded: {error}") from error


def _at_size(mask_HW: np.ndarray, size: tuple[int, int]) -> tuple[dict[str, Any], float]:
    """Run lengths and area of a mask at another size (height, width)."""
    if mask_HW.shape != size:
        mask_HW = np.asarray(Image.fromarray(mask_HW).resize((size[1], size[0]), Image.Resampling.NEAREST))
    return encode_rle(mask_HW), float(mask_HW.sum())
