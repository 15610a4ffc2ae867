"""What makes a good semantic map: features and grounds compared on one trained network, without any further training.

    python benchmarks/semantic_map.py MODEL --data FOLDER --limit 96

The network sees training images and is prompted with their boxes; M_I is its positives merged as in training (Eq. 6). From
M_I, prototypes of the classes are collected (and of what surrounds them), and semantic maps are made from them in several
ways. Printed: mean IoU with the real masks, on the mask grid and inside the boxes, of each map by itself and mixed with M_I.

    features   mask: the pixel decoder's mask features (the paper's); backbone: three stages of the backbone, side by side
    ground     none: cosine with the class (Eq. 1); inside: minus the cosine with the box's pixels that M_I leaves out; around:
               those and a rim outside of the box; instance: figure and ground of each instance alone, two rounds
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sim_hf import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data import DetectionCollator, EvalTransform, MixedRows, SeededDataset, load_coco
from sim_hf.mask_generation import PrototypeBank, instance_probability_map, positive_mask_weights, predicted_boxes
from sim_hf.structures import box_masks
from sim_hf.training.arguments import RunArguments, SupervisionArguments
from sim_hf.training.assembly import build_step
from sim_hf.training.step import TrainingStep

CONFIDENT, EMPTY = 0.7, 0.2
RIM = 0.25  # of the box's sides
PIXELS = 256  # of an instance
TEMPERATURE = 0.1
SHARES = (0.5, 0.7)  # of M_I in the mixtures (alpha of Eq. 7)
BATCH = 8


@dataclass
class Seen:
    """A batch as the network saw it: M_I inside the boxes, the real masks, the boxes and their rims, features by name."""

    labels_G: Tensor
    image_ids_G: Tensor
    instance_GHW: Tensor
    real_GHW: Tensor
    box_GHW: Tensor
    rim_GHW: Tensor
    features: dict[str, Tensor]


@torch.no_grad()
def look(step: TrainingStep, rows, processor, limit: int) -> list[Seen]:
    samples = SeededDataset(rows, EvalTransform(int(processor.size["longest_edge"]), with_masks=True))
    collate = DetectionCollator(processor.image_mean, processor.image_std)
    stages: list[Tensor] = []
    step.teacher.model.model.pixel_level_module.encoder.register_forward_hook(lambda m, i, o: stages.extend(o.feature_maps[:3]))
    seen = []
    for start in range(0, min(limit, len(samples)), BATCH):
        inputs = step.prepare(collate([samples[i] for i in range(start, min(start + BATCH, limit, len(samples)))]))
        targets = inputs.targets
        if len(targets) == 0:
            continue
        stages.clear()
        outputs = step.teacher(**inputs.network_inputs(inputs.student_prompts_BP4))
        positives = step.criterion.teacher_positives(outputs, targets, global_step=0)
        size = tuple(positives.mask_logits_NHW.shape[-2:])
        stride = targets.input_size[0] / size[0]
        weights_N = positive_mask_weights(
            predicted_boxes(positives.mask_logits_NHW, stride), targets.boxes_G4, positives.instance_ids_N
        )
        merged = instance_probability_map(positives.mask_logits_NHW, weights_N, positives.instance_ids_N, len(targets))
        box_GHW = box_masks(targets.boxes_G4, *size, stride)
        rim_G4 = RIM * (targets.boxes_G4[:, 2:] - targets.boxes_G4[:, :2]).repeat(1, 2) * torch.tensor([-1.0, -1, 1, 1])
        backbone = [functional.normalize(functional.interpolate(stage.float(), size, mode="bilinear"), dim=1) for stage in stages]
        seen.append(
            Seen(
                targets.class_labels_G,
                targets.image_ids_G,
                merged * box_GHW,
                functional.adaptive_avg_pool2d(targets.masks_GHW[:, None].float(), size)[:, 0] > 0.5,
                box_GHW,
                box_masks(targets.boxes_G4 + rim_G4, *size, stride),
                {"mask": functional.normalize(outputs.mask_features.float(), dim=1), "backbone": torch.cat(backbone, 1) / 3**0.5},
            )
        )
    return seen


def prototypes(seen: list[Seen], features: str, ground: str, num_classes: int) -> Tensor:
    """Of every class (ground "none"), or of its ground -> (K, L, C)."""
    bank = PrototypeBank(num_classes, feature_dim=seen[0].features[features].shape[1])
    for batch in seen:
        wanted_GHW = {
            "none": batch.instance_GHW > CONFIDENT,
            "inside": batch.box_GHW & (batch.instance_GHW < EMPTY),
            "around": batch.rim_GHW & (batch.instance_GHW < EMPTY),
        }[ground]
        for g, wanted_HW in enumerate(wanted_GHW):
            cells = wanted_HW.flatten().nonzero()[:, 0]
            cells = cells[torch.linspace(0, max(len(cells) - 1, 0), min(PIXELS, len(cells))).long()]
            pixels_MC = batch.features[features][batch.image_ids_G[g]].flatten(1)[:, cells].T
            bank.observe(pixels_MC, batch.labels_G[g].expand(len(cells)))
        bank.commit()
    return bank.prototypes_KLC


def nearest(batch: Seen, features: str, prototypes_KLC: Tensor) -> Tensor:
    """Cosine with the nearest prototype of each instance's class -> (G, H, W)."""
    pairs = zip(batch.labels_G, batch.image_ids_G, strict=True)
    return torch.stack(
        [torch.einsum("lc,chw->lhw", prototypes_KLC[label], batch.features[features][image]).amax(0) for label, image in pairs]
    )


def of_instances(batch: Seen, features: str, rounds: int = 2) -> Tensor:
    """Cosine with the mean of the figure minus that with the mean of the ground, of every instance alone -> (G, H, W)."""
    maps = []
    for g, instance_HW in enumerate(batch.instance_GHW):
        pixels_CHW, figure_HW = batch.features[features][batch.image_ids_G[g]], instance_HW
        for _ in range(rounds):
            weights = (figure_HW * (figure_HW > 0.5), batch.rim_GHW[g] * (1 - figure_HW) * (figure_HW < 0.5))
            figure_C, ground_C = (
                functional.normalize((pixels_CHW * weight_HW).flatten(1).sum(1), dim=0) for weight_HW in weights
            )
            difference_HW = torch.einsum("c,chw->hw", figure_C - ground_C, pixels_CHW)
            figure_HW = (instance_HW + (difference_HW / TEMPERATURE).sigmoid() * batch.box_GHW[g]) / 2
        maps.append(difference_HW)
    return torch.stack(maps)


def ious(found_GHW: Tensor, batch: Seen) -> list[float]:
    chosen_G = batch.real_GHW.flatten(1).any(-1)
    found_GHW, real_GHW = (found_GHW & batch.box_GHW)[chosen_G], batch.real_GHW[chosen_G]
    union_G = (found_GHW | real_GHW).flatten(1).sum(-1).clamp(min=1)
    return ((found_GHW & real_GHW).flatten(1).sum(-1) / union_G).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("--data", type=Path, required=True, help="images/ + instances_train.json with masks")
    parser.add_argument("--limit", type=int, default=96, help="training images")
    options = parser.parse_args()
    network = SIMForInstanceSegmentation.from_pretrained(options.model, dtype=torch.float32)
    processor = SIMImageProcessor.from_pretrained(options.model)
    rows = MixedRows([load_coco(options.data / "images", options.data / "instances_train.json", with_masks=True)])
    label_of = {name: int(label) for label, name in network.config.id2label.items()}
    rows.label_maps = [[label_of[name] for name in rows.names]]  # the model's labels
    step = build_step(network, processor, SupervisionArguments(pseudo_start=0), RunArguments()).eval()
    seen = look(step, rows, processor, options.limit)
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for batch in seen:
        found["M_I", "", "alone"] += ious(batch.instance_GHW > 0.5, batch)
        found["box filled in", "", "alone"] += ious(batch.box_GHW, batch)
    for features in ("mask", "backbone"):
        figure_KLC = prototypes(seen, features, "none", len(label_of))
        grounds = {name: prototypes(seen, features, name, len(label_of)) for name in ("inside", "around")}
        for batch in seen:
            figure_GHW = nearest(batch, features, figure_KLC)
            maps = {"none": figure_GHW, "instance": of_instances(batch, features)}
            maps |= {name: figure_GHW - nearest(batch, features, ground_KLC) for name, ground_KLC in grounds.items()}
            for name, difference_GHW in maps.items():
                semantic_GHW = (difference_GHW / TEMPERATURE).sigmoid() * batch.box_GHW
                found[features, name, "alone"] += ious(semantic_GHW > 0.5, batch)
                for share in SHARES:
                    mixed_GHW = torch.lerp(semantic_GHW, batch.instance_GHW, share)
                    found[features, name, f"{share:g} M_I"] += ious(mixed_GHW > 0.5, batch)
    columns = ["alone", *(f"{share:g} M_I" for share in SHARES)]
    print(f"{options.data.name}: {len(found['M_I', '', 'alone'])} instances of {options.limit} training images")
    print("| features | ground | " + " | ".join(columns) + " |\n" + "|---" * (2 + len(columns)) + "|")
    for features, ground in dict.fromkeys(key[:2] for key in found):
        values = [found.get((features, ground, column)) for column in columns]
        cells = ["" if value is None else f"{sum(value) / len(value):.3f}" for value in values]
        print(f"| {features} | {ground} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
