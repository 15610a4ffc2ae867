"""Positive mask weighting, looked at: an object's positives, and what each of them counts (SIM, Eq. 6).

    python examples/positive_weights.py assets/sim-tiny                                            # on generated scenes
    python examples/positive_weights.py runs/mine/model --annotations boxes.json --images images   # on your own data

Several predictions belong to an object: locations near its centre (CondInst), or the queries of all decoder layers that are
matched to it and the answers to its box (Mask2Former). Each row of the picture shows an object: the given box, some of its
positives from the heaviest to the lightest with mask, predicted box and weight w, and the mask that their weighted sum gives.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from sim_hf import SIMImageProcessor, draw_instances, load_coco, load_model
from sim_hf.data import DetectionCollator, EvalTransform, SeededDataset, write_scenes
from sim_hf.evaluation.prediction import names_of
from sim_hf.mask_generation import instance_probability_map, positive_mask_weights, predicted_boxes
from sim_hf.structures import box_iou_pairwise
from sim_hf.training.arguments import RunArguments, SupervisionArguments
from sim_hf.training.assembly import build_step
from sim_hf.training.step import TrainingStep
from sim_hf.visualization import contact_sheet

CELL, MARGIN = 170, 0.3  # longer side of a cell; what is shown around a box, as a share of its longer side


@dataclass(frozen=True)
class WeighedPositives:
    """The positives of one object, the heaviest first. picture: the network's input; box_4, boxes_N4: the given box and the
    predicted ones, xyxy in its pixels; masks_NHW: above 0.5, as `merged_HW`, the weighted sum."""

    picture: Image.Image
    name: str
    box_4: Tensor
    boxes_N4: Tensor
    masks_NHW: Tensor
    weights_N: Tensor
    ious_N: Tensor
    merged_HW: Tensor


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    annotations, images = options.annotations, options.images
    if annotations is None:
        scenes = write_scenes(options.output / "scenes", num_train=0, num_val=options.scenes, seed=options.seed)
        annotations, images = scenes / "instances_val.json", scenes / "images"

    # 1. The model as the teacher of a training step, whose criterion says which predictions are an object's positives.
    model, processor = load_model(options.model).eval(), SIMImageProcessor.from_pretrained(options.model)
    step = build_step(model, processor, SupervisionArguments(), RunArguments()).eval()
    rows = load_coco(images, annotations)
    samples = SeededDataset(rows, EvalTransform(processor.size.longest_edge, processor.size.shortest_edge))
    collate = DetectionCollator(processor.image_mean, processor.image_std)

    # 2. Ask it, weigh the positives, and draw.
    names = rows.features["objects"]["category"].feature.names
    shown = options.show or range(min(3, len(rows)))
    objects = [found for index in shown for found in weigh(step, collate([samples[index]]), names)][: options.objects]
    middle = [""] * (options.columns - 2)
    titles = ["given box", "heaviest", *middle, "lightest", "weighted sum"]
    captions = [f"{found.name}: {len(found.weights_N)} positives" for found in objects]
    cells = [draw(found, options.columns) for found in objects]
    picture = options.picture or options.output / "weights.jpg"
    contact_sheet(cells, titles, captions, cell_size=CELL).save(picture, quality=75, optimize=True)
    print(f"look at {picture}")


@torch.no_grad()
def weigh(step: TrainingStep, batch: dict, names: list[str]) -> list[WeighedPositives]:
    """The objects of a batch of one image. names: of the file's classes, of which the model must know those that are here."""
    (labels,) = batch["labels"]
    here = [names[label] for label in labels["class_labels"].tolist()]
    label_of = {name: label for label, name in names_of(step.teacher.model).items()}
    if unknown := set(here) - set(label_of):
        raise SystemExit(f"the model does not know {', '.join(sorted(unknown))}")
    labels["class_labels"] = torch.tensor([label_of[name] for name in here], dtype=torch.long)
    inputs = step.prepare(batch)
    targets = inputs.targets
    outputs = step.teacher(**inputs.network_inputs(inputs.student_prompts_BP4))
    positives = step.criterion.teacher_positives(outputs, targets, global_step=0)
    logits_NHW, ids_N = positives.mask_logits_NHW, positives.instance_ids_N
    boxes_N4 = positives.boxes_N4
    if boxes_N4 is None:  # a network that predicts masks only: the extents of these
        boxes_N4 = predicted_boxes(logits_NHW, targets.input_size[0] / logits_NHW.shape[-2])
    weights_N = positive_mask_weights(boxes_N4, targets.boxes_G4, ids_N)
    ious_N = box_iou_pairwise(boxes_N4, targets.boxes_G4[ids_N])
    merged_GHW = instance_probability_map(logits_NHW, weights_N, ids_N, len(targets))
    masks_NHW, merged_GHW = (_at_size(x, targets.input_size) > 0.5 for x in (logits_NHW.sigmoid(), merged_GHW))

    height, width = (int(side.sum()) for side in (inputs.pixel_mask_BHW[0, :, 0], inputs.pixel_mask_BHW[0, 0]))
    pixels_HWC = (inputs.images_BCHW[0, :, :height, :width].permute(1, 2, 0) * 255).round().clamp(0, 255).byte()
    picture = Image.fromarray(pixels_HWC.numpy())
    found = []
    for row, name in enumerate(here):
        own = (ids_N == row).nonzero()[:, 0]
        own = own[weights_N[own].argsort(descending=True, stable=True)]
        parts = (boxes_N4[own], masks_NHW[own], weights_N[own], ious_N[own], merged_GHW[row])
        found.append(WeighedPositives(picture, name, targets.boxes_G4[row], *parts))
    return found


def _at_size(maps_NHW: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(maps_NHW[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def draw(found: WeighedPositives, columns: int) -> list[Image.Image | None]:
    """A row of the sheet."""
    left, top, right, bottom = surroundings(found)
    picture = found.picture.crop((left, top, right, bottom))
    corner_4 = torch.tensor([left, top, left, top])
    limits_4 = torch.tensor([picture.width, picture.height] * 2)

    def cell(box_4: Tensor, mask_HW: Tensor | None, text: str = "", weight: Tensor | None = None) -> Image.Image:
        inside_4 = (box_4 - corner_4).clamp(min=0).minimum(limits_4)  # or its label might find no place
        shown = {"boxes": inside_4[None], "labels": [0]}
        shown |= {} if mask_HW is None else {"masks": mask_HW[None, top:bottom, left:right]}
        shown |= {} if weight is None else {"scores": weight[None]}
        return draw_instances(picture, shown, {0: text}, side=CELL, with_labels=weight is not None)

    count = len(found.weights_N)
    ranks = torch.linspace(0, max(count - 1, 0), min(columns, count)).round().long().tolist()
    chosen: list[Image.Image | None] = [
        cell(found.boxes_N4[rank], found.masks_NHW[rank], f"IoU {found.ious_N[rank]:.2f}  w", found.weights_N[rank])
        for rank in ranks
    ]
    empty = [None] * (columns - len(chosen))
    return [cell(found.box_4, None), *chosen, *empty, cell(found.box_4, found.merged_HW)]


def surroundings(found: WeighedPositives) -> tuple[int, int, int, int]:
    """What is shown of the picture: the box and something around it."""
    x1, y1, x2, y2 = found.box_4.tolist()
    margin = MARGIN * max(x2 - x1, y2 - y1)
    width, height = found.picture.size
    left, top = max(0, int(x1 - margin)), max(0, int(y1 - margin))
    return left, top, min(width, int(x2 + margin) + 1), min(height, int(y2 + margin) + 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("--annotations", type=Path, help="COCO file with boxes (default: generated scenes)")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--output", type=Path, default=Path("runs/weights"), help="folder for weights.jpg")
    parser.add_argument("--picture", type=Path, help="where the picture goes (default: OUTPUT/weights.jpg)")
    parser.add_argument("--show", type=int, nargs="+", metavar="INDEX", help="images that are shown (default: the first 3)")
    parser.add_argument("--objects", type=int, default=6, help="how many objects at most")
    parser.add_argument("--columns", type=int, default=4, help="how many positives of an object")
    parser.add_argument("--scenes", type=int, default=8, help="number of generated scenes")
    parser.add_argument("--seed", type=int, default=1, help="of the generated scenes")
    options = parser.parse_args()
    if (options.annotations is None) != (options.images is None):
        parser.error("--annotations and --images go together")
    if options.columns < 2:
        parser.error("--columns must be at least 2")
    return options


if __name__ == "__main__":
    main()
