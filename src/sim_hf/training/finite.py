"""The check before every update: a run stops with the names of what is not finite, and with everything as it was."""

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


def check_finite(record: Mapping[str, float], inputs: Sequence[StepInputs], *, step: int, accelerator: Accelerator) -> None:
    """Stop on all ranks before the update. record: the named losses (`loss_...`) of this rank and the norm of the reduced
    gradient, which is non-finite on every rank if a loss was on any, so all ranks come here together. With fp16 an infinite
    gradient alone is the scaler's business."""
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if not bad:
        return
    guilty = [name for name in bad if name.startswith("loss_")]
    if accelerator.mixed_precision == "fp16":
        num_guilty: Any = accelerator.reduce(torch.tensor(float(len(guilty)), device=accelerator.device), "sum")
        if not float(num_guilty):
            return
    images = [key for micro in inputs for key in micro.image_keys]
    reports = gather_object([f"rank {accelerator.process_index}: {', '.join(guilty) or 'gradient'} (images {images})"])
    raise NonFiniteLossError(f"step {step}: not finite before the update, nothing was changed. " + "; ".join(reports))
