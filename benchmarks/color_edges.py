"""How much colour knows about outlines: what the settings of the pairwise loss take for one object, without any training.

    python benchmarks/color_edges.py DATA/animals DATA/tiny5 --image_size 256 --min_contrast 0 60

The pairwise loss asks neighbours of similar colour to be of one object. Printed for every data set and setting, as means over
the training images: of the neighbours on two sides of a real outline the share that count as similar (each of them pulls the
mask across the outline), and of the neighbours inside one object the share that do (each of them holds it together); the same
for the quarter of the images with the least contrast. The real masks are read for this only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sim_hf.data import DetectionCollator, EvalTransform, SeededDataset, load_coco
from sim_hf.losses import color_similarity, half_ring_offsets, rgb_to_lab

STRIDE = 4
MEAN, STD = [0.0] * 3, [1.0] * 3  # colours as they are in the file


def instance_map(masks_GHW: Tensor, height: int, width: int) -> Tensor:
    """Which object a cell belongs to, 0 for none; the last one where several cover most of it -> (H, W)."""
    ids_HW = torch.zeros(height, width, dtype=torch.long)
    for index, mask_HW in enumerate(masks_GHW):
        ids_HW[functional.adaptive_avg_pool2d(mask_HW[None, None].float(), (height, width))[0, 0] > 0.5] = index + 1
    return ids_HW


def neighbours(values_HW: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """The two ends of all pairs that are so far apart, as flat rows."""
    height, width = values_HW.shape
    left, stop = max(0, -right), width - max(0, right)
    anchors = values_HW[: height - down, left:stop]
    return anchors.flatten(), values_HW[down:, left + right : stop + right].flatten()


def shares(similar_KHW: Tensor, ids_HW: Tensor, dilation: int) -> tuple[float, float]:
    """(across an outline, inside an object): the shares of the pairs that count as similar; nan without such a pair."""
    across, inside = [], []
    for similar_HW, (down, right) in zip(similar_KHW, half_ring_offsets(3, dilation), strict=True):
        first, second = neighbours(ids_HW, down, right)
        similar = neighbours(similar_HW, down, right)[0]
        across.append(similar[first != second])
        inside.append(similar[(first == second) & (first > 0)])
    return torch.cat(across).float().mean().item(), torch.cat(inside).float().mean().item()


def measure(folder: Path, options: argparse.Namespace) -> list[tuple[float, list[tuple[float, float]]]]:
    """Of every image its contrast and, for every `--min_contrast`, its two shares."""
    rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
    samples = SeededDataset(rows, EvalTransform(options.image_size, with_masks=True))
    collate = DetectionCollator(MEAN, STD)
    found = []
    for index in range(0, len(samples), max(1, len(samples) // options.limit)):
        batch = collate([samples[index]])
        images_B3HW, valid_BHW = batch["pixel_values"], batch["pixel_mask"]
        masks_GHW = batch["labels"][0].get("masks", [])
        if not len(masks_GHW):
            continue
        ids_HW = instance_map(masks_GHW, images_B3HW.shape[2] // STRIDE, images_B3HW.shape[3] // STRIDE)
        pooled_13HW = functional.avg_pool2d(images_B3HW, STRIDE)
        seen_HW = functional.avg_pool2d(valid_BHW[:, None].float(), STRIDE)[0, 0] == 1
        lightness = rgb_to_lab(pooled_13HW)[0, 0][seen_HW]
        contrast = (lightness.quantile(0.99) - lightness.quantile(0.01)).item()
        of_settings = []
        for least in options.min_contrast:
            (similarity_KHW,) = color_similarity(
                images_B3HW, valid_BHW, stride=STRIDE, dilation=options.dilation, min_contrast=least
            )
            of_settings.append(shares(similarity_KHW >= options.threshold, ids_HW, options.dilation))
        found.append((contrast, of_settings))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders with images/ and instances_train.json, masks included")
    parser.add_argument("--image_size", type=int, default=256, help="longest side of the input")
    parser.add_argument("--min_contrast", type=float, nargs="+", default=[0.0, 60.0], help="settings to compare")
    parser.add_argument("--threshold", type=float, default=0.1, help="color_threshold")
    parser.add_argument("--dilation", type=int, default=1, help="pairwise_dilation")
    parser.add_argument("--limit", type=int, default=96, help="images of each data set, evenly spaced")
    options = parser.parse_args()
    print("| images | contrast: least, median | min_contrast | similar across outlines | inside objects | duller quarter |")
    print("|---|---|---|---|---|---|")
    for folder in options.data:
        found = measure(folder, options)
        contrasts = [contrast for contrast, _ in found]
        for setting, least in enumerate(options.min_contrast):
            pairs_N2 = torch.tensor([of_settings[setting] for _, of_settings in found])
            across, inside = pairs_N2.nanmean(0).tolist()
            dull_across, dull_inside = pairs_N2[: max(1, len(found) // 4)].nanmean(0).tolist()
            print(
                f"| {folder.name} ({len(found)}) | {contrasts[0]:.0f}, {contrasts[len(found) // 2]:.0f} | {least:g}"
                f" | {across:.3f} | {inside:.3f} | {dull_across:.3f}, {dull_inside:.3f} |"
            )


if __name__ == "__main__":
    main()
