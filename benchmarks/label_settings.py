"""How `sim-hf label` turns on its settings: mean IoU of the masks it gives to the boxes of data that has real masks.

    python benchmarks/label_settings.py assets/sim-tiny --data FOLDER... --limit 120

Reads the *training* images of each folder (instances_train.json, with masks): settings chosen there may be judged on the
validation images. One setting is changed at a time from the defaults of `LabelOptions`; the rows are sorted by the mean over
the folders.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from sim_hf import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data import load_coco, read_image
from sim_hf.data.augmentation import read_sample
from sim_hf.labeling import LabelOptions, masks_for_boxes
from sim_hf.structures import box_masks

CHOICES = {
    "mu": (2.0, 3.0, 5.0, 10.0, 20.0),
    "class_weight": (0.0, 0.5, 1.0, 2.0),
    "fit_threshold": (True, False),
    "blob_radius": (1.0, 1.15, 1.25, 1.4),
    "trust_power": (1.0, 2.0, 3.0),
    "crop_below": (0.0, 0.25, 0.5, 1.0),
    "crop_margins": ((0.35,), (0.8,), (0.35, 0.8), (1.2,), (3.0,), (0.2, 0.6, 1.2), (0.35, 0.8, 1.5, 2.5)),
    "prompt_weight": (0.0, 1.0, 3.0, 10.0, 1e6),
    "flip": (True, False),
    "pixel_competition": (True, False),
}


def variants() -> dict[str, LabelOptions]:
    """The defaults, and each setting changed alone."""
    default = LabelOptions()
    found = {"defaults": default}
    for name, values in CHOICES.items():
        for value in values:
            if value != asdict(default)[name]:
                found[f"{name}={value}"] = replace(default, **{name: value})
    return found


def mean_ious(model, processor, folder: Path, options: dict[str, LabelOptions], limit: int) -> dict[str, float]:
    """Mean IoU over the boxes of the first `limit` training images, per setting, and of the filled boxes."""
    rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
    labels = {name.strip().lower(): label for label, name in model.config.id2label.items()}
    names = rows.features["objects"]["category"].feature.names
    sums, count = dict.fromkeys(["boxes filled in", *options], 0.0), 0
    for row in tqdm(rows.select(range(min(limit, len(rows)))), desc=folder.name, unit="image"):
        sample = read_sample(row, with_masks=True)
        sample = sample.select(sample.has_mask_n)
        if len(sample.boxes_n4) == 0:
            continue
        given = [labels.get(names[index].strip().lower()) for index in sample.class_labels_n.tolist()]
        picture = read_image(row["image"])
        height, width = sample.image_3hw.shape[-2:]
        sums["boxes filled in"] += _iou(box_masks(sample.boxes_n4, height, width, 1), sample.masks_nhw)
        for name, option in options.items():
            sums[name] += _iou(
                masks_for_boxes(model, processor, picture, sample.boxes_n4, given, option).masks(), sample.masks_nhw
            )
        count += len(sample.boxes_n4)
    return {name: total / max(count, 1) for name, total in sums.items()}


def _iou(masks_nhw: torch.Tensor, others_nhw: torch.Tensor) -> float:
    both = (masks_nhw & others_nhw).flatten(1).sum(-1)
    return float((both / (masks_nhw | others_nhw).flatten(1).sum(-1).clamp(min=1)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folders with images/ and instances_train.json")
    parser.add_argument("--limit", type=int, default=120, help="images per folder")
    arguments = parser.parse_args()
    model = SIMForInstanceSegmentation.from_pretrained(arguments.model).eval()
    processor = SIMImageProcessor.from_pretrained(arguments.model)
    options = variants()
    found = {folder.name: mean_ious(model, processor, folder, options, arguments.limit) for folder in arguments.data}
    print("mean IoU with the real masks".ljust(30), *(name.rjust(12) for name in found), "mean".rjust(12))
    means = {name: sum(column[name] for column in found.values()) / len(found) for name in ["boxes filled in", *options]}
    for name in sorted(means, key=means.__getitem__, reverse=True):
        print(name.ljust(30), *(f"{column[name]:12.4f}" for column in found.values()), f"{means[name]:12.4f}")


if __name__ == "__main__":
    main()
