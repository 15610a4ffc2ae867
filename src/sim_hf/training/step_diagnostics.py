"""What can be said of the masks of a training step without real masks."""

from __future__ import annotations

import torch

from sim_hf.evaluation.diagnostics import mask_diagnostics
from sim_hf.structures import CriterionOutput
from sim_hf.training.step import StepInputs


@torch.no_grad()
def step_diagnostics(inputs: StepInputs, output: CriterionOutput) -> dict[str, float]:
    """The criterion's diagnostics, and fill, corners, centre, leak and shape similarity of the student's final positives."""
    values = {name: float(value) for name, value in output.diagnostics.items()}
    positives = output.positives
    if positives is not None and len(positives.mask_logits_NHW):
        stride = inputs.targets.input_size[0] / positives.mask_logits_NHW.shape[-2]
        boxes_N4 = inputs.targets.boxes_G4[positives.instance_ids_N]
        measured = mask_diagnostics(positives.mask_logits_NHW.sigmoid(), boxes_N4, stride)
        values |= {name: float(value) for name, value in measured.items()}
    return values
