"""What every supervision must offer, and the arithmetic that they share.

Shape letters: G instances of the batch, N positives, Q queries, H and W of the mask grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sim_hf.losses import masked_bce_loss, masked_dice_loss
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions

_CELLS_OF_A_CALL = 2**21


class MaskCriterion(Protocol):
    """The price of masks: one class for each supervision, chosen in `build.py`."""

    def matching_cost(self, mask_logits_QHW: Tensor, targets: InstanceTargets, *, global_step: int) -> Tensor:
        """Cost (Q, G) of giving each query to each instance, each pair for itself: queries and instances of several images may
        come together, and nobody reads the pairs across images."""
        ...

    def needs_teacher(self, global_step: int) -> bool:
        """Whether this step reads the teacher's predictions."""
        ...

    def __call__(
        self,
        students: Sequence[MaskPredictions],
        teacher: MaskPredictions | None,
        targets: InstanceTargets,
        images_BCHW: Tensor,
        pixel_mask_BHW: Tensor,
        *,
        num_instances: float,
        global_step: int,
    ) -> CriterionOutput:
        """Losses of the student's positives (one entry per supervised decoder layer).

        images_BCHW: RGB in 0..1. num_instances: annotated instances of the whole optimiser step, over all micro-batches and
        ranks; every loss is a sum over instances divided by it, so that accumulation and ranks do not change the gradient.
        """
        ...


def grid_stride(targets: InstanceTargets, mask_logits_NHW: Tensor) -> float:
    """Input pixels per cell of the mask grid."""
    return targets.input_size[0] / mask_logits_NHW.shape[-2]


def linear_warmup(step: int, warmup_steps: int) -> float:
    """0 at step 0, 1 from `warmup_steps` on; 1 everywhere when there is no warm-up."""
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def sum_over_layers(losses: Sequence[Tensor], num_instances: float) -> Tensor:
    """Per-instance losses of each layer -> one scalar with a gradient path even when there is no instance."""
    return torch.stack([loss_N.sum() for loss_N in losses]).sum() / num_instances


def in_few_calls(students: Sequence[MaskPredictions]) -> list[MaskPredictions]:
    """The same rows in the same order with small layers joined, for terms that look at each row alone: a call takes longer than
    a small layer, and the copy that joins large ones takes memory."""
    groups: list[list[MaskPredictions]] = []
    for student in students:
        if groups and sum(part.mask_logits_NHW.numel() for part in [*groups[-1], student]) <= _CELLS_OF_A_CALL:
            groups[-1].append(student)
        else:
            groups.append([student])
    return [_joined(group) for group in groups]


def _joined(parts: Sequence[MaskPredictions]) -> MaskPredictions:
    if len(parts) == 1:
        return parts[0]
    return MaskPredictions(
        mask_logits_NHW=torch.cat([part.mask_logits_NHW for part in parts]),
        instance_ids_N=torch.cat([part.instance_ids_N for part in parts]),
        scores_N=torch.cat([part.scores_N for part in parts]),
        mask_features_BCHW=parts[0].mask_features_BCHW,
    )


def zero_with_gradient(students: Sequence[MaskPredictions]) -> Tensor:
    """0, connected to the predictions of every layer: a loss that does not apply still reaches every parameter. A sum over
    nothing, since 0 times a sum of huge logits is not 0."""
    return torch.stack([student.mask_logits_NHW[:0].sum() for student in students]).sum()


def masks_on_grid(targets: InstanceTargets, chosen_G: Tensor, height: int, width: int) -> Tensor:
    """Share of each grid cell that the masks of the chosen instances cover -> float32 (G, height, width), 0 for the others."""
    masks_GHW = torch.zeros(len(targets), height, width, device=targets.boxes_G4.device)
    rows = chosen_G.nonzero()[:, 0]
    if targets.masks_GHW is not None and len(rows) > 0:
        chosen_N1HW = targets.masks_GHW[rows][:, None].float()
        masks_GHW[rows] = torch.nn.functional.adaptive_avg_pool2d(chosen_N1HW, (height, width))[:, 0]
    return masks_GHW


def known_mask_losses(
    students: Sequence[MaskPredictions],
    mask_GHW: Tensor,
    applies_G: Tensor,
    trusted_GHW: Tensor | None = None,
    weight_G: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """BCE and Dice of every layer against known masks on the grid, zero for instances to which they do not apply."""
    bce, dice = [], []
    for student in students:
        ids_N = student.instance_ids_N
        chosen_N = applies_G[ids_N].nonzero(as_tuple=True)[0]
        logits_NHW, ids_N = student.mask_logits_NHW[chosen_N], ids_N[chosen_N]
        if len(chosen_N) == 0:  # of the usual batch: nothing pasted, no real mask
            nothing_N = logits_NHW.sum((1, 2))
            bce.append(nothing_N)
            dice.append(nothing_N)
            continue
        trusted_NHW = None if trusted_GHW is None else trusted_GHW[ids_N]
        weight_N = 1.0 if weight_G is None else weight_G[ids_N]
        bce.append(weight_N * masked_bce_loss(logits_NHW, mask_GHW[ids_N], trusted_NHW))
        dice.append(weight_N * masked_dice_loss(logits_NHW, mask_GHW[ids_N], trusted_NHW))
    return bce, dice
