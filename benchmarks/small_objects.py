"""How near the box, the ellipse in it and a network come to the real masks of objects, by the size of the object.

    python benchmarks/small_objects.py FOLDER... --model assets/sim-tiny

Reads the training images of each folder (instances_train.json, with masks); sizes are sqrt(width * height) of the box in pixels
of an input whose longest side is --image-size. The network sees each picture once, whole, at its own input size, and gets the
boxes, as a teacher does in training. Why pseudo masks of few cells lean on the ellipse (`sim_hf.mask_generation.small_objects`),
and up to which size.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from sim_hf import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data import decode_segmentation, load_coco, read_image
from sim_hf.labeling import Labeller, LabelOptions, network_labeller

EDGES = (0, 8, 12, 16, 20, 24, 32, 64, np.inf)


def iou(mask_HW: np.ndarray, real_HW: np.ndarray) -> float:
    return float((mask_HW & real_HW).sum() / max((mask_HW | real_HW).sum(), 1))


def guesses(box: list[float], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels whose middle lies in the box (xywh), and those whose middle lies in the ellipse."""
    left, top, wide, high = box
    y_H1 = (np.arange(height)[:, None] + 0.5 - top) / high * 2 - 1  # -1..1 from side to side
    x_1W = (np.arange(width)[None] + 0.5 - left) / wide * 2 - 1
    return (abs(y_H1) < 1) & (abs(x_1W) < 1), y_H1**2 + x_1W**2 < 1


def measure(folder: Path, image_size: int, limit: int, labeller: Labeller | None, known: dict[str, int]) -> np.ndarray:
    """-> (objects, 5): size in input pixels; IoU of box, ellipse and network (NaN without one); label."""
    rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
    names = rows.features["objects"]["category"].feature.names
    found = []
    for row in tqdm(rows.select(range(0, len(rows), -(-len(rows) // limit))), desc=folder.name, unit="image"):
        height, width, objects = row["height"], row["width"], row["objects"]
        given = [i for i, box in enumerate(objects["bbox"]) if objects["segmentation"][i] and min(box[2:]) >= 1]
        if not given:
            continue
        boxes = torch.tensor([objects["bbox"][i] for i in given])
        boxes[:, 2:] += boxes[:, :2]
        labels = [known.get(names[objects["category"][i]].strip().lower()) for i in given]
        masks = labeller(read_image(row["image"]), boxes, labels) if labeller else None
        for place, i in enumerate(given):
            box = objects["bbox"][i]
            real_HW = np.asarray(decode_segmentation(objects["segmentation"][i], height, width)) > 0
            ious = [iou(mask_HW, real_HW) for mask_HW in guesses(box, height, width)]
            ious.append(iou(masks.mask(place).numpy(), real_HW) if masks else np.nan)
            found.append([(box[2] * box[3]) ** 0.5 * image_size / max(height, width), *ious, objects["category"][i]])
    return np.array(found).reshape(-1, 5)


def report(name: str, found: np.ndarray) -> None:
    """A line for each range of sizes, and one for the classes."""
    for low, high in itertools.pairwise(EDGES):
        chosen = found[(found[:, 0] >= low) & (found[:, 0] < high)]
        if len(chosen):
            box, ellipse, network = chosen[:, 1:4].mean(0)
            print(f"{name}: {low} to {high} px, {len(chosen)}: box {box:.3f}, ellipse {ellipse:.3f}, network {network:.3f}")
    small = found[found[:, 0] < 32]
    groups = [small[small[:, 4] == label] for label in np.unique(small[:, 4])]
    groups = [group for group in groups if len(group) >= 6]
    nearer = sum(group[:, 2].mean() > group[:, 1].mean() for group in groups)
    print(f"{name}: below 32 px the ellipse is nearer than the box in {nearer} of {len(groups)} classes with 6 objects or more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders with images/ and instances_train.json, with masks")
    parser.add_argument("--model", help="folder or Hub id of a network to compare with")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--limit", type=int, default=250, help="images per folder, evenly spaced")
    arguments = parser.parse_args()
    labeller, known = None, {}
    if arguments.model:
        model = SIMForInstanceSegmentation.from_pretrained(arguments.model).eval()
        processor = SIMImageProcessor.from_pretrained(arguments.model)
        labeller = network_labeller(model, processor, LabelOptions(crop_below=0.0, flip=False))
        known = {name.strip().lower(): label for label, name in model.config.id2label.items()}
    for folder in arguments.data:
        report(folder.name, measure(folder, arguments.image_size, arguments.limit, labeller, known))


if __name__ == "__main__":
    main()
