"""The losses of a step over all ranks, and the check before every update: a run stops with the names of what is not finite,
and with everything as it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sim_hf.training.step import StepInputs


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the update, naming the term, the step and the images."""


def sum_over_ranks(losses: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Each rank's part of the named losses -> those of the whole step. All ranks call it with the same names."""
    if accelerator.num_processes == 1:
        return dict(losses)
    names = sorted(losses)
    parts = torch.tensor([losses[name] for name in names], device=accelerator.device)
    sums: Any = accelerator.reduce(parts, "sum")
    return dict(zip(names, sums.tolist(), strict=True))


def check_finite(
    losses: Mapping[str, float],
    own_losses: Mapping[str, float],
    gradient_norm: float,
    inputs: Sequence[StepInputs],
    *,
    step: int,
    accelerator: Accelerator,
) -> None:
    """Stop on all ranks, or on none: `losses` (see `sum_over_ranks`) and the norm of the reduced gradient are the same on
    all. own_losses: this rank's, for the report. With fp16 an infinite gradient alone is the scaler's business."""
    losses_are_finite = all(math.isfinite(value) for value in losses.values())
    if losses_are_finite and (math.isfinite(gradient_norm) or accelerator.mixed_precision == "fp16"):
        return
    guilty = [name for name, value in own_losses.items() if not math.isfinite(value)]
    report = []
    if guilty or losses_are_finite:
        images = [key for micro in inputs for key in micro.image_keys]
        report = [f"rank {accelerator.process_index}: {', '.join(guilty) or 'gradient'} (images {images})"]
    reports = "; ".join(gather_object(report))
    raise NonFiniteLossError(f"step {step}: not finite before the update, nothing was changed. {reports}")
