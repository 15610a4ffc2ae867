"""The second phase of a run: the teacher labels the training images once, and from then on these masks are trained on.

Not in SIM; after Mask Auto-Labeler (arXiv 2301.03992), which labels first and then trains another network. Labelling may take
its time (boxes as prompts, small objects enlarged, neighbours compete: `labeling.masks_for_boxes`), so these masks are better
than what the same teacher says in passing during a step. A promptable segmenter may be asked in the teacher's place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sim_hf.data import encode_rle, read_image
from sim_hf.labeling import Labeller, LabelOptions

NO_MASK = ""  # in `objects.segmentation`: the instance has a box only
# Without the mirrored views, which cost half of the time (benchmarks/label_settings.py has what they bring).
OPTIONS = LabelOptions(flip=False)
MIN_CONFIDENCE = 0.5  # instances whose mask is in doubt keep the losses of boxes
FOLDER = "second_phase"  # in the run's --output_dir
_FILE = "masks.jsonl"


class LabelledRows:
    """Rows of boxes with generated masks. masks[i]: for each object of row i a COCO run length as JSON, or NO_MASK. A real
    mask that a row brings itself stays."""

    def __init__(self, rows: Any, masks: Sequence[Sequence[str]]) -> None:
        if len(rows) != len(masks):
            raise ValueError(f"{len(rows)} rows and masks of {len(masks)}")
        self.rows = rows
        self.masks = masks

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        objects = dict(row["objects"])
        generated = self.masks[index]
        if len(generated) != len(objects["bbox"]):
            raise ValueError(f"row {index} has {len(objects['bbox'])} objects and generated masks of {len(generated)}")
        real = objects.get("segmentation") or [NO_MASK] * len(generated)
        objects["segmentation"] = [own or made for own, made in zip(real, generated, strict=True)]
        return row | {"objects": objects}


def generate_masks(
    labeller: Labeller,
    rows: Any,
    folder: Path,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
    min_confidence: float = MIN_CONFIDENCE,
) -> list[list[str]]:
    """Masks of all rows, made by all processes together (each calls this) and kept in `folder` -> as `LabelledRows` takes them.

    rows: map-style, with the labels that the labeller knows. Crowds and boxes without area get none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"part-{process_index}.jsonl"
    mine = tqdm(
        range(process_index, len(rows), num_processes), desc="label", unit="image", disable=process_index > 0, leave=False
    )
    with own.open("w", encoding="utf-8") as file:
        for index in mine:
            file.write(json.dumps({"row": index, "objects": _masks_of_row(labeller, rows[index])}) + "\n")
    barrier()
    if process_index == 0:
        parts = [folder / f"part-{rank}.jsonl" for rank in range(num_processes)]
        records = sorted((record for part in parts for record in _records(part)), key=lambda record: record["row"])
        whole = folder / f"{_FILE}.new"
        whole.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        whole.replace(folder / _FILE)  # in one move: the file is there when all of it is
        for part in parts:
            part.unlink()
    barrier()
    return read_masks(folder, min_confidence=min_confidence)


def read_masks(folder: Path, *, min_confidence: float = MIN_CONFIDENCE) -> list[list[str]]:
    """What `generate_masks` has left in `folder`. Raises FileNotFoundError when it did not come to its end."""
    return [
        [mask if confidence >= min_confidence else NO_MASK for mask, confidence in record["objects"]]
        for record in _records(folder / _FILE)
    ]


def _masks_of_row(labeller: Labeller, row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(mask, confidence) of every object of the row, in its order."""
    objects = row["objects"]
    crowd = objects.get("iscrowd") or [False] * len(objects["bbox"])
    chosen = [i for i, box in enumerate(objects["bbox"]) if not crowd[i] and min(box[2:]) > 0]
    found: list[tuple[str, float]] = [(NO_MASK, 0.0)] * len(objects["bbox"])
    if chosen:
        boxes_n4 = torch.tensor([objects["bbox"][i] for i in chosen], dtype=torch.float32)
        boxes_n4[:, 2:] += boxes_n4[:, :2]
        labels = [int(objects["category"][i]) for i in chosen]
        masks = labeller(read_image(row["image"]), boxes_n4, labels)
        for place, i in enumerate(chosen):
            mask = masks.mask(place)
            if bool(mask.any()):
                found[i] = (json.dumps(encode_rle(mask.numpy())), round(float(masks.confidence_n[place]), 4))
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
