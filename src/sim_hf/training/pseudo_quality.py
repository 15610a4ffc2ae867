"""How good are SIM's pseudo masks on the training images? A measurement only: it reads masks that training never sees."""

from __future__ import annotations

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from sim_hf.data import DetectionCollator, EvalTransform, SeededDataset
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
    if not ours:
        return {}
    better = sum(a > b for a, b in zip(ours, filled, strict=True)) / len(ours)
    return {
        "pseudo_mask_iou": sum(ours) / len(ours),
        "filled_box_iou": sum(filled) / len(filled),
        "share_improved": better,
        "instances": float(len(ours)),
    }


def _iou(masks_GHW: Tensor, others_GHW: Tensor) -> Tensor:
    both = (masks_GHW & others_GHW).flatten(1).sum(-1)
    return both / (masks_GHW | others_GHW).flatten(1).sum(-1).clamp(min=1)
