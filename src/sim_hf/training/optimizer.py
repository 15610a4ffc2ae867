"""The optimisers, with a slower backbone, and the learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "poly", "constant", "step")
STEP_FACTOR = 0.1  # of the learning rate at each of the steps of "step"
_UNDECAYED_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)


def build_optimizer(
    model: nn.Module,
    *,
    optimizer: str = "adamw",
    learning_rate: float,
    backbone_lr_multiplier: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Mask2Former's recipe: no decay on norms, biases and embeddings, a smaller rate for the backbone. With a multiplier of 0
    the backbone is frozen: its parameters no longer require gradients, whose time and memory are saved.

    optimizer: one of `OPTIMIZERS`. momentum: of SGD; AdamW has its own.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    undecayed = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _UNDECAYED_LAYERS) or name.endswith("bias") or parameter.ndim <= 1
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        in_backbone = ".encoder." in name and "pixel_level_module.encoder" in name
        if in_backbone and backbone_lr_multiplier == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            groups.setdefault((in_backbone, id(parameter) in undecayed), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": learning_rate * (backbone_lr_multiplier if in_backbone else 1.0),
            "weight_decay": 0.0 if is_undecayed else weight_decay,
        }
        for (in_backbone, is_undecayed), parameters in groups.items()
    ]
    if optimizer == "sgd":
        return torch.optim.SGD(settings, lr=learning_rate, momentum=momentum)
    adamw = torch.optim.AdamW(settings, lr=learning_rate, fused=True)
    make_skips_visible(adamw)
    return adamw


def make_skips_visible(optimizer: torch.optim.Optimizer) -> None:
    """With fp16 a fused optimiser looks for overflow inside `step`, and Accelerate takes every step that was called for one
    that was made. After this the scaler unscales the gradients and calls `step` only when they are finite."""
    optimizer._step_supports_amp_scaling = False


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: str,
    warmup_steps: int,
    max_steps: int,
    lr_steps: Sequence[int] = (),
    restart_step: int | None = None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then one of `SCHEDULES`: cosine to 1 %, polynomial decay (power 0.9), constant, or times `STEP_FACTOR` at
    each of `lr_steps`. With `restart_step` the same once more from that step on: the first part ends where a run of its length
    would."""
    if schedule not in SCHEDULES:
        raise ValueError(f"--lr_schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")

    def shape(step: int, length: int) -> float:
        if schedule == "step":  # steps are counted from the start, warm-up included
            return STEP_FACTOR ** sum(step >= lr_step * length / max_steps for lr_step in lr_steps)
        progress = min(1.0, (step - warmup_steps) / max(1, length - warmup_steps))
        if schedule == "cosine":
            return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
        return (1 - progress) ** 0.9 if schedule == "poly" else 1.0

    def factor(step: int) -> float:
        length = max_steps
        if restart_step is not None and step < restart_step:
            length = restart_step
        elif restart_step is not None:
            step, length = step - restart_step, max_steps - restart_step
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return shape(step, length)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
