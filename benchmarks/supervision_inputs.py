"""What the supervision gets to see in `speed_supervision.py`: pictures with boxes, and predictions such as a half-trained
network makes them: smooth blobs inside their boxes, with noise.

Shape letters: B images, G instances, N positives, K classes, L prototypes, C channels, H W mask grid.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sim_hf.data import read_image, write_scenes
from sim_hf.structures import InstanceTargets, MaskPredictions

STRIDE = 4
SMALLEST_SIDE = 4.0  # pixels: what cutting leaves of a box
NUM_PROTOTYPES = 10
FEATURE_DIM = 256
EARLIER_MOVES = 100  # of every prototype


@dataclass(frozen=True)
class Picture:
    """image_3HW: RGB in 0..1. boxes_G4: xyxy pixels. labels_G: class of each box."""

    image_3HW: Tensor
    boxes_G4: Tensor
    labels_G: Tensor


@dataclass(frozen=True)
class Inputs:
    """One batch. students: the matched queries of each decoder layer, leaves that want a gradient. teacher: all layers' in
    one list, with the mask features."""

    images_B3HW: Tensor
    valid_BHW: Tensor
    targets: InstanceTargets
    students: list[MaskPredictions]
    teacher: MaskPredictions
    prototypes_KLC: Tensor
    counts_KL: Tensor

    @property
    def num_instances(self) -> int:
        return len(self.targets)

    def box_share(self) -> float:
        """Mean share of its picture that a box covers."""
        boxes_G4, (height, width) = self.targets.boxes_G4, self.targets.input_size
        return float((boxes_G4[:, 2:] - boxes_G4[:, :2]).prod(1).mean()) / (height * width)


def read_pictures(data: Path | None, size: tuple[int, int], count: int) -> tuple[list[Picture], int]:
    """`count` pictures of `size` (height, width) with their boxes, and the number of classes.

    Those whose boxes are the most usual in size: the time depends on how much of a picture the boxes cover. The pictures are
    those of instances_val.json in the COCO folder `data`, scaled and cut to the size; generated scenes when `data` is None.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = data or write_scenes(Path(temporary) / "scenes", num_train=0, num_val=8 * count, size=320, progress=False)
        document = json.loads((folder / "instances_val.json").read_text(encoding="utf-8"))
        label_of = {category["id"]: label for label, category in enumerate(document["categories"])}
        boxes: dict[int, tuple[Tensor, Tensor]] = {}
        for image in document["images"]:
            own = [a for a in document["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
            boxes_G4 = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
            labels_G = torch.tensor([label_of[a["category_id"]] for a in own], dtype=torch.long)
            boxes_G4, kept_G = fitted_boxes(boxes_G4, (image["height"], image["width"]), size)
            if kept_G.any():
                boxes[image["id"]] = boxes_G4[kept_G], labels_G[kept_G]
        if len(boxes) < count:
            raise ValueError(f"{folder}: {len(boxes)} pictures with boxes in instances_val.json, expected at least {count}")
        usual = float(torch.cat([areas(boxes_G4) for boxes_G4, _ in boxes.values()]).mean())
        by_distance = sorted(boxes, key=lambda image_id: abs(float(areas(boxes[image_id][0]).mean()) - usual))
        names = {image["id"]: image["file_name"] for image in document["images"]}
        pictures = [
            Picture(fitted_image(read_image(folder / "images" / names[image_id]), size), *boxes[image_id])
            for image_id in by_distance[:count]
        ]
    return pictures, len(label_of)


def halved(picture: Picture) -> Picture:
    """The same picture at half of its size."""
    return Picture(functional.avg_pool2d(picture.image_3HW, 2), picture.boxes_G4 / 2, picture.labels_G)


def fitted_image(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scaled to cover `size` and cut around the middle. -> (3, H, W) in 0..1"""
    (scale, left, top), (height, width) = placing((image.height, image.width), size), size
    box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


def fitted_boxes(boxes_G4: Tensor, picture_size: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """xywh of the whole picture -> xyxy of the scaled and cut one, and which are still boxes.

    Edges are put on half pixels: no centre of a cell lies on one, where it would be a matter of taste who gets it.
    """
    (scale, left, top), (height, width) = placing(picture_size, size), size
    boxes_G4 = torch.cat([boxes_G4[:, :2], boxes_G4[:, :2] + boxes_G4[:, 2:]], 1) * scale
    boxes_G4 = (boxes_G4 - torch.tensor([left, top, left, top])).floor() + 0.5
    limits_4 = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes_G4 = torch.minimum(boxes_G4.clamp(min=0), limits_4)
    return boxes_G4, (boxes_G4[:, 2:] - boxes_G4[:, :2]).amin(1) >= SMALLEST_SIDE


def placing(picture_size: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float]:
    """Scale, and what is cut away at the left and at the top, in scaled pixels."""
    scale = max(size[0] / picture_size[0], size[1] / picture_size[1])
    return scale, (picture_size[1] * scale - size[1]) / 2, (picture_size[0] * scale - size[0]) / 2


def areas(boxes_G4: Tensor) -> Tensor:
    return (boxes_G4[:, 2:] - boxes_G4[:, :2]).prod(1)


def make_inputs(
    pictures: list[Picture], num_classes: int, *, num_instances: int, num_layers: int, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """A batch of these pictures; boxes are repeated until there are `num_instances`, shared evenly by the pictures. Made on
    the CPU, so every device has the same."""
    generator = torch.Generator().manual_seed(seed)
    images_B3HW = torch.stack([picture.image_3HW for picture in pictures])
    batch_size, _, height, width = images_B3HW.shape
    image_ids_G = torch.arange(num_instances) * batch_size // num_instances
    picks = [(image, turn) for image in range(batch_size) for turn in range(int((image_ids_G == image).sum()))]
    targets = InstanceTargets(
        boxes_G4=torch.stack([pictures[i].boxes_G4[turn % len(pictures[i].boxes_G4)] for i, turn in picks]),
        class_labels_G=torch.stack([pictures[i].labels_G[turn % len(pictures[i].labels_G)] for i, turn in picks]),
        image_ids_G=image_ids_G,
        input_size=(height, width),
        num_images=batch_size,
    )
    prototypes_KLC = torch.randn(num_classes, NUM_PROTOTYPES, FEATURE_DIM, generator=generator)
    prototypes_KLC = functional.normalize(prototypes_KLC, dim=-1)
    features_BCHW = mask_features(targets, prototypes_KLC, generator)
    orders = [torch.randperm(num_instances, generator=generator) for _ in range(2 * num_layers)]
    layers = [blob_logits(targets.boxes_G4[ids_N], targets.input_size, generator) for ids_N in orders]
    features_BCHW = features_BCHW.to(device)

    def positives(logits_NHW: Tensor, ids_N: Tensor) -> MaskPredictions:
        return MaskPredictions(logits_NHW.to(device), ids_N.to(device), torch.ones(len(ids_N), device=device), features_BCHW)

    students = [positives(*layer) for layer in zip(layers[:num_layers], orders[:num_layers], strict=True)]
    for student in students:
        student.mask_logits_NHW.requires_grad_()
    return Inputs(
        images_B3HW=images_B3HW.to(device),
        valid_BHW=torch.ones(batch_size, height, width, dtype=torch.bool, device=device),
        targets=InstanceTargets(
            boxes_G4=targets.boxes_G4.to(device),
            class_labels_G=targets.class_labels_G.to(device),
            image_ids_G=targets.image_ids_G.to(device),
            input_size=targets.input_size,
            num_images=targets.num_images,
        ),
        students=students,
        teacher=positives(torch.cat(layers[num_layers:]), torch.cat(orders[num_layers:])),
        prototypes_KLC=prototypes_KLC.to(device),
        counts_KL=torch.full((num_classes, NUM_PROTOTYPES), EARLIER_MOVES, device=device),
    )


def blob_logits(boxes_N4: Tensor, input_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """An ellipse in each box, its edge bent by smooth noise, and a little noise in every cell. -> (N, H, W), about -7 to 6"""
    radius_NHW = ellipse_radius(boxes_N4, input_size)
    height, width = radius_NHW.shape[1:]
    coarse_N1hw = torch.randn(len(boxes_N4), 1, max(height // 8, 1), max(width // 8, 1), generator=generator)
    smooth_NHW = functional.interpolate(coarse_N1hw, (height, width), mode="bilinear", align_corners=False)[:, 0]
    noise_NHW = torch.randn(radius_NHW.shape, generator=generator)
    return (3 * (1 - radius_NHW**2)).clamp(min=-5) + smooth_NHW + 0.3 * noise_NHW


def mask_features(targets: InstanceTargets, prototypes_KLC: Tensor, generator: torch.Generator) -> Tensor:
    """Noise everywhere, and inside each instance's ellipse, more towards its middle, one prototype of its class."""
    radius_GHW = ellipse_radius(targets.boxes_G4, targets.input_size)
    _, num_prototypes, channels = prototypes_KLC.shape
    features_BCHW = torch.randn(targets.num_images, channels, *radius_GHW.shape[1:], generator=generator)
    for instance, (image, label) in enumerate(zip(targets.image_ids_G.tolist(), targets.class_labels_G.tolist(), strict=True)):
        strength_HW = 6 * (1.2 - radius_GHW[instance]).clamp(0, 1)
        prototype_C = prototypes_KLC[label, instance % num_prototypes]
        features_BCHW[image] += prototype_C[:, None, None] * strength_HW
    return features_BCHW


def ellipse_radius(boxes_N4: Tensor, input_size: tuple[int, int]) -> Tensor:
    """Distance of each cell from the middle of the box: 1 on the ellipse that touches the box. -> (N, H, W)"""
    rows_H = (torch.arange(input_size[0] // STRIDE) + 0.5) * STRIDE
    columns_W = (torch.arange(input_size[1] // STRIDE) + 0.5) * STRIDE
    x1_N, y1_N, x2_N, y2_N = boxes_N4.unbind(1)
    down_NH = (rows_H - (y1_N + y2_N)[:, None] / 2) / ((y2_N - y1_N)[:, None] / 2)
    right_NW = (columns_W - (x1_N + x2_N)[:, None] / 2) / ((x2_N - x1_N)[:, None] / 2)
    return torch.hypot(down_NH[:, :, None], right_NW[:, None, :])
