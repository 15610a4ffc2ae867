"""How good are SIM's masks of the training images? A measurement only: it reads masks that training never sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from sim_hf.data import DetectionCollator, EvalTransform, SeededDataset, decode_segmentation
from sim_hf.structures import box_masks
from sim_hf.training.step import TrainingStep


@torch.no_grad()
def pseudo_mask_quality(step: TrainingStep, rows, processor, *, limit: int = 64, batch_size: int = 8) -> dict[str, float]:
    """Mean IoU with the real masks, on the mask grid, of the pseudo masks and of the boxes filled in, over the first `limit`
    images. rows: a data set loaded with masks; its labels must be the model's. Empty when there is nothing to compare."""
    teacher = step.teacher
    if teacher is None:
        raise ValueError("pseudo masks are made from a teacher's predictions, and this training step has no teacher")
    size = int(processor.size["longest_edge"])
    samples = SeededDataset(rows, EvalTransform(size, with_masks=True))
    collate = DetectionCollator(processor.image_mean, processor.image_std)
    device = next(teacher.model.parameters()).device
    was_training = step.training
    step.eval()
    ours, filled = [], []
    for start in range(0, min(limit, len(samples)), batch_size):
        batch = collate([samples[i] for i in range(start, min(start + batch_size, limit, len(samples)))])
        inputs = step.prepare(send_to_device(batch, device))  # the boxes in the list of labels too
        targets = inputs.targets
        real_GHW, has_mask_G = targets.masks_GHW, targets.has_mask_G
        # The supervision must take them for box-only: the masks are for the comparison.
        targets.masks_GHW, targets.has_mask_G = None, torch.zeros_like(has_mask_G)
        pseudo = step(teacher, inputs, step.normalizers([inputs])).pseudo_masks
        if pseudo is None or real_GHW is None:
            continue
        height, width = pseudo.target_GHW.shape[-2:]
        stride = targets.input_size[0] / height
        coverage_GHW = torch.nn.functional.adaptive_avg_pool2d(real_GHW[:, None].float(), (height, width))[:, 0]
        real_GHW = coverage_GHW > 0.5
        chosen_G = has_mask_G & real_GHW.flatten(1).any(-1)
        ours += _iou(pseudo.probabilities_GHW[chosen_G] > 0.5, real_GHW[chosen_G]).tolist()
        filled += _iou(box_masks(targets.boxes_G4[chosen_G], height, width, stride), real_GHW[chosen_G]).tolist()
    step.train(was_training)
    return _summary(ours, filled)


def generated_mask_quality(rows, masks: Sequence[Sequence[str]], *, limit: int = 64) -> dict[str, float]:
    """The same of the masks of the second phase (`training.second_phase`), in pixels of the images; instances that kept their
    box count as the box filled in. rows: a data set loaded with masks, in the order of `masks`."""
    ours, filled = [], []
    for row, generated in zip(rows.select(range(min(limit, len(rows)))), masks, strict=False):
        objects, size = row["objects"], (row["height"], row["width"])
        for real, mask, (x, y, w, h) in zip(objects["segmentation"], generated, objects["bbox"], strict=True):
            if not real:
                continue
            real_HW = decode_segmentation(real, *size, annotation_id=row["image_id"])
            box_HW = np.zeros(size, dtype=bool)
            box_HW[round(y) : max(round(y + h), round(y) + 1), round(x) : max(round(x + w), round(x) + 1)] = True
            mask_HW = decode_segmentation(mask, *size, annotation_id=row["image_id"]) if mask else box_HW
            for found, candidate_HW in ((ours, mask_HW), (filled, box_HW)):
                found.append(float((candidate_HW & real_HW).sum() / max((candidate_HW | real_HW).sum(), 1)))
    return _summary(ours, filled)


def _summary(ours: list[float], filled: list[float]) -> dict[str, float]:
    if not ours:
        return {}
    return {
        "pseudo_mask_iou": sum(ours) / len(ours),
        "filled_box_iou": sum(filled) / len(filled),
        "share_improved": sum(a > b for a, b in zip(ours, filled, strict=True)) / len(ours),
        "instances": float(len(ours)),
    }


def _iou(masks_GHW: Tensor, others_GHW: Tensor) -> Tensor:
    both = (masks_GHW & others_GHW).flatten(1).sum(-1)
    return both / (masks_GHW | others_GHW).flatten(1).sum(-1).clamp(min=1)
