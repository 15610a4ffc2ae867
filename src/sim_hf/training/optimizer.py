"""AdamW with a slower backbone, and the learning rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

_UNDECAYED_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)


def build_optimizer(
    model: nn.Module, *, learning_rate: float, backbone_lr_multiplier: float, weight_decay: float
) -> torch.optim.AdamW:
    """Mask2Former's recipe: no decay on norms, biases and embeddings, a smaller rate for the backbone. With a multiplier of 0
    the backbone is frozen: its parameters no longer require gradients, whose time and memory are saved."""
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
    optimizer = torch.optim.AdamW(settings, lr=learning_rate, fused=True)
    make_skips_visible(optimizer)
    return optimizer


def make_skips_visible(optimizer: torch.optim.Optimizer) -> None:
    """With fp16 a fused optimiser looks for overflow inside `step`, and Accelerate takes every step that was called for one
    that was made. After this the scaler unscales the gradients and calls `step` only when they are finite."""
    optimizer._step_supports_amp_scaling = False


def build_scheduler(
    optimizer: torch.optim.Optimizer, *, schedule: str, warmup_steps: int, max_steps: int, restart_step: int | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then cosine to 1 % or polynomial (power 0.9) decay, or constant. With `restart_step` the same once more
    from that step on: the first part ends where a run of its length would."""
    shapes = {
        "cosine": lambda progress: 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2,
        "poly": lambda progress: (1 - progress) ** 0.9,
        "constant": lambda progress: 1.0,
    }
    if schedule not in shapes:
        raise ValueError(f"--lr_schedule must be one of {', '.join(shapes)}, got {schedule!r}")

    def factor(step: int) -> float:
        length = max_steps
        if restart_step is not None and step < restart_step:
            length = restart_step
        elif restart_step is not None:
            step, length = step - restart_step, max_steps - restart_step
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return shapes[schedule](min(1.0, (step - warmup_steps) / max(1, length - warmup_steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
