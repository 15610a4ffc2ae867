"""How near the box and the ellipse in it come to the real masks of objects, by the size of the object.

    python benchmarks/small_objects.py FOLDER... --image-size 256

Reads the training images of each folder (instances_train.json, with masks); sizes are sqrt(width * height) of the box in pixels
of an input whose longest side is --image-size. Why pseudo masks of few cells lean on the ellipse
(`sim_hf.mask_generation.small_objects`).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sim_hf.data import decode_segmentation, load_coco

EDGES = (0, 16, 32, 64, np.inf)


def ious(box: list[float], real_HW: np.ndarray) -> tuple[float, float]:
    """IoU of the real mask with the pixels whose middle lies in the box, and with those whose middle lies in the ellipse."""
    height, width = real_HW.shape
    left, top, wide, high = box
    y_H1 = (np.arange(height)[:, None] + 0.5 - top) / high * 2 - 1  # -1..1 from side to side
    x_1W = (np.arange(width)[None] + 0.5 - left) / wide * 2 - 1
    filled_HW = (abs(y_H1) < 1) & (abs(x_1W) < 1)
    ellipse_HW = y_H1**2 + x_1W**2 < 1
    found = [float((mask & real_HW).sum() / max((mask | real_HW).sum(), 1)) for mask in (filled_HW, ellipse_HW)]
    return found[0], found[1]


def measure(folder: Path, image_size: int, limit: int) -> np.ndarray:
    """-> (objects, 4): size in input pixels, the two IoUs, label."""
    rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
    found = []
    for row in tqdm(rows.select(range(0, len(rows), -(-len(rows) // limit))), desc=folder.name, unit="image"):
        height, width = row["height"], row["width"]
        objects = row["objects"]
        for box, segmentation, label in zip(objects["bbox"], objects["segmentation"], objects["category"], strict=True):
            if not segmentation or min(box[2:]) < 1:
                continue
            size = (box[2] * box[3]) ** 0.5 * image_size / max(height, width)
            found.append([size, *ious(box, np.asarray(decode_segmentation(segmentation, height, width)) > 0), label])
    return np.array(found).reshape(-1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders with images/ and instances_train.json, with masks")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--limit", type=int, default=250, help="images per folder, evenly spaced")
    arguments = parser.parse_args()
    for folder in arguments.data:
        found = measure(folder, arguments.image_size, arguments.limit)
        for low, high in itertools.pairwise(EDGES):
            chosen = found[(found[:, 0] >= low) & (found[:, 0] < high)]
            if len(chosen):
                box, ellipse = chosen[:, 1:3].mean(0)
                print(f"{folder.name}: {low} to {high} px, {len(chosen)} objects: box {box:.3f}, ellipse {ellipse:.3f}")
        small = found[found[:, 0] < 32]
        classes = [small[small[:, 3] == label] for label in np.unique(small[:, 3])]
        many = [group for group in classes if len(group) >= 6]
        better = sum(group[:, 2].mean() > group[:, 1].mean() for group in many)
        print(f"{folder.name}: below 32 px the ellipse is nearer in {better} of {len(many)} classes with 6 objects or more")


if __name__ == "__main__":
    main()
