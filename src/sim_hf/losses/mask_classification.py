"""Pixel classification against a mask: BCE and Dice on the pixels that are trusted (SIM, Eq. 8), and Mask2Former's
point sampling (Cheng et al. 2022, Sec. 3.3) for training with real masks.

Shape letters: N predictions assigned to an instance, Q queries, G annotated instances, P points, H and W rows and
columns. The two losses take any shape behind N: maps (N, H, W) or sampled points (N, P).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sim_hf.losses.precision import at_least_float32, autocast_disabled

DICE_SMOOTHING = 1.0  # Mask2Former; makes the loss of an empty target fall as the mask empties, and 0 without any pixel


def masked_bce_loss(mask_logits_NHW: Tensor, target_NHW: Tensor, trusted_NHW: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the trusted pixels (first half of SIM, Eq. 8) -> (N,).

    target_NHW: bool, or a probability in 0..1. trusted_NHW: W of Eq. 8, bool or weights; None trusts every pixel. An
    instance without a trusted pixel gives 0.
    """
    logits_NP, target_NP, trusted_NP = _flat(mask_logits_NHW, target_NHW, trusted_NHW)
    losses_NP = functional.binary_cross_entropy_with_logits(logits_NP, target_NP, reduction="none")
    # Divided before the sum: no partial sum is larger than the largest loss, whatever the logits.
    if trusted_NP is None:
        return (losses_NP / max(losses_NP.shape[1], 1)).sum(-1)
    total_N1 = trusted_NP.sum(-1, keepdim=True)
    shares_NP = trusted_NP / torch.where(total_N1 > 0, total_N1, 1)
    return (losses_NP * shares_NP).sum(-1)


def masked_dice_loss(mask_logits_NHW: Tensor, target_NHW: Tensor, trusted_NHW: Tensor | None = None) -> Tensor:
    """Dice loss on the trusted pixels (second half of SIM, Eq. 8), in the smoothed form of Mask2Former -> (N,) in 0..1.

    1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1). Arguments as in `masked_bce_loss`.
    """
    logits_NP, target_NP, trusted_NP = _flat(mask_logits_NHW, target_NHW, trusted_NHW)
    probabilities_NP = logits_NP.sigmoid()
    if trusted_NP is not None:
        probabilities_NP = probabilities_NP * trusted_NP
    overlap_N = (probabilities_NP * target_NP).sum(-1)
    sizes_N = probabilities_NP.sum(-1) + (target_NP if trusted_NP is None else target_NP * trusted_NP).sum(-1)
    return 1 - (2 * overlap_N + DICE_SMOOTHING) / (sizes_N + DICE_SMOOTHING)


def sample_points(maps_NHW: Tensor, points_NP2: Tensor) -> Tensor:
    """Bilinear values of each map at its points -> (N, P), float32.

    Points are (x, y) in 0..1 of the map, whose pixel centres lie at (i + 0.5) / size; a map is 0 outside of itself. The
    same points may be used on maps of different sizes (logits at stride 4, masks at input size).
    """
    if points_NP2.ndim != 3 or points_NP2.shape[0] != maps_NHW.shape[0] or points_NP2.shape[2] != 2:
        raise ValueError(f"points must be ({maps_NHW.shape[0]}, P, 2), got {tuple(points_NP2.shape)}")
    maps_NHW = at_least_float32(maps_NHW)
    grid_NP12 = (2 * points_NP2.to(maps_NHW.dtype) - 1)[:, :, None]
    return functional.grid_sample(maps_NHW[:, None], grid_NP12, mode="bilinear", align_corners=False)[:, 0, :, 0]


@torch.no_grad()
def uncertain_points(
    mask_logits_NHW: Tensor,
    num_points: int,
    oversample_ratio: float = 3.0,
    importance_ratio: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points where the mask is undecided (PointRend; Mask2Former, Sec. 3.3) -> (N, P, 2), (x, y) in 0..1.

    Of `oversample_ratio * num_points` uniform points, the `importance_ratio * num_points` with the smallest |logit| are
    kept; fresh uniform points fill up. The uniform points are shared by all rows, so what a row gets does not depend on the
    rows beside it (and so not on how a batch is split). `generator` may live on another device than the logits.
    """
    if oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
        raise ValueError(
            f"expected oversample_ratio >= 1, importance_ratio in 0..1, got {oversample_ratio} and {importance_ratio}"
        )
    num_rows = mask_logits_NHW.shape[0]
    num_important = int(importance_ratio * num_points)

    def uniform(count: int) -> Tensor:
        source = mask_logits_NHW.device if generator is None else generator.device
        return torch.rand(1, count, 2, device=source, generator=generator).to(mask_logits_NHW.device).expand(num_rows, -1, -1)

    candidates_NM2 = uniform(int(oversample_ratio * num_points))
    sureness_NM = sample_points(mask_logits_NHW, candidates_NM2).abs()
    chosen_NP = sureness_NM.topk(num_important, dim=1, largest=False, sorted=False).indices
    important_NP2 = candidates_NM2.gather(1, chosen_NP[:, :, None].expand(-1, -1, 2))
    return torch.cat([important_NP2, uniform(num_points - num_important)], dim=1)


@torch.no_grad()
def bce_cost(logits_QP: Tensor, targets_GP: Tensor) -> Tensor:
    """`masked_bce_loss` of every query with every instance at shared points, for matching -> (Q, G)."""
    logits_QP, targets_GP = _matching_points(logits_QP, targets_GP)
    # Divided before the sum over the points, and positive terms only: nothing cancels and no partial sum overflows.
    num_points = max(logits_QP.shape[1], 1)
    if_object_QP = functional.softplus(-logits_QP) / num_points
    if_background_QP = functional.softplus(logits_QP) / num_points
    with autocast_disabled(logits_QP):
        return if_object_QP @ targets_GP.T + if_background_QP @ (1 - targets_GP).T


@torch.no_grad()
def dice_cost(logits_QP: Tensor, targets_GP: Tensor) -> Tensor:
    """`masked_dice_loss` of every query with every instance at shared points, for matching -> (Q, G)."""
    logits_QP, targets_GP = _matching_points(logits_QP, targets_GP)
    probabilities_QP = logits_QP.sigmoid()
    with autocast_disabled(logits_QP):
        overlap_QG = probabilities_QP @ targets_GP.T
    sizes_QG = probabilities_QP.sum(-1)[:, None] + targets_GP.sum(-1)[None, :]
    return 1 - (2 * overlap_QG + DICE_SMOOTHING) / (sizes_QG + DICE_SMOOTHING)


def _flat(logits: Tensor, target: Tensor, trusted: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, ...) -> (N, P) in one floating dtype; no silent broadcasting over instances."""
    if target.shape != logits.shape or (trusted is not None and trusted.shape != logits.shape):
        others = [tuple(tensor.shape) for tensor in (target, trusted) if tensor is not None]
        raise ValueError(f"target and trusted must have the shape of the logits {tuple(logits.shape)}, got {others}")
    logits_NP = at_least_float32(logits).flatten(1)
    target_NP = target.to(logits_NP.dtype).flatten(1)
    return logits_NP, target_NP, None if trusted is None else trusted.to(logits_NP.dtype).flatten(1)


def _matching_points(logits_QP: Tensor, targets_GP: Tensor) -> tuple[Tensor, Tensor]:
    if logits_QP.ndim != 2 or targets_GP.ndim != 2 or logits_QP.shape[1] != targets_GP.shape[1]:
        raise ValueError(
            "expected logits (Q, P) and targets (G, P) at the same points, "
            f"got {tuple(logits_QP.shape)} and {tuple(targets_GP.shape)}"
        )
    logits_QP = at_least_float32(logits_QP)
    return logits_QP, targets_GP.to(logits_QP.dtype)
