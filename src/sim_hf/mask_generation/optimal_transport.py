"""Optimal-transport assignment of pixels to prototypes (SIM, Sec. 3.2; Sinkhorn-Knopp in the log domain).

Shape letters: K classes, M pixels of a class (padded), L prototypes of a class.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp() of the differences is 0 or saturated far below these; they only keep sums of float32 logarithms finite.
_LARGEST_SCORE = 1e8
_LOG_OF_NOTHING = -1e30


@torch.no_grad()
def sinkhorn_assignment(
    similarity_KML: Tensor,
    valid_KM: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    num_iterations: int = 3,
    prototype_marginal_KL: Tensor | None = None,
) -> Tensor:
    """Entropic transport max_Q Tr(Q^T S) + epsilon H(Q) of the pixels of each class to its prototypes. -> (K, M, L) float32

    Every valid pixel brings the same mass; every prototype receives the same mass, or its entry of
    `prototype_marginal_KL` (any non-negative scale, a class-balanced choice). Rows of valid pixels sum to 1, rows of invalid
    ones are 0; a pixel with a non-finite similarity counts as invalid. No iteration at all is the softmax over prototypes.
    """
    _check_arguments(similarity_KML, valid_KM, epsilon, num_iterations, prototype_marginal_KL)
    if similarity_KML.numel() == 0:
        return torch.zeros_like(similarity_KML, dtype=torch.float32)
    # Pixels side by side in memory: they are many and the prototypes few, so every sum runs along whole vectors.
    scores_KLM = similarity_KML.float().transpose(1, 2).contiguous()
    finite_KM = scores_KLM.isfinite().all(1)
    valid_K1M = (finite_KM if valid_KM is None else finite_KM & valid_KM)[:, None, :]
    scores_KLM = torch.where(valid_K1M, scores_KLM, 0.0).div_(epsilon).clamp_(-_LARGEST_SCORE, _LARGEST_SCORE)

    # Only sums over valid pixels may see a pixel. A finite stand-in for log 0: a class without valid pixels stays finite.
    pixel_mask_K1M = torch.where(valid_K1M, 0.0, _LOG_OF_NOTHING)
    log_marginal_KL1 = _log_marginal(prototype_marginal_KL, scores_KLM)
    prototype_potential_KL1 = torch.zeros_like(log_marginal_KL1)
    pixel_potential_K1M = pixel_mask_K1M
    for _ in range(num_iterations):
        received_KL1 = torch.logsumexp(scores_KLM + pixel_potential_K1M, dim=2, keepdim=True)
        prototype_potential_KL1 = log_marginal_KL1 - received_KL1
        # The pixels' 1/N_valid is one constant for all of a class: the next line of either kind absorbs it.
        brought_K1M = torch.logsumexp(scores_KLM + prototype_potential_KL1, dim=1, keepdim=True)
        pixel_potential_K1M = pixel_mask_K1M - brought_K1M
    return (torch.softmax(scores_KLM + prototype_potential_KL1, dim=1) * valid_K1M).transpose(1, 2)


def _log_marginal(prototype_marginal_KL: Tensor | None, scores_KLM: Tensor) -> Tensor:
    """Logarithm of the prototypes' shares; uniform when not given, or where a class gives only zeros. -> (K, L, 1)"""
    num_classes, num_prototypes, _ = scores_KLM.shape
    uniform_KL = scores_KLM.new_full((num_classes, num_prototypes), 1.0 / num_prototypes)
    if prototype_marginal_KL is None:
        return uniform_KL.log()[:, :, None]
    given_KL = prototype_marginal_KL.float()
    total_K1 = given_KL.sum(-1, keepdim=True)
    shares_KL = torch.where(total_K1 > 0, given_KL / total_K1, uniform_KL)
    return shares_KL.log()[:, :, None]


def _check_arguments(
    similarity_KML: Tensor,
    valid_KM: Tensor | None,
    epsilon: float,
    num_iterations: int,
    prototype_marginal_KL: Tensor | None,
) -> None:
    if similarity_KML.dim() != 3 or similarity_KML.shape[-1] == 0:
        raise ValueError(f"similarity must be (classes, pixels, prototypes >= 1), got {tuple(similarity_KML.shape)}")
    if valid_KM is not None and (valid_KM.shape != similarity_KML.shape[:2] or valid_KM.dtype != torch.bool):
        raise ValueError(f"valid must be bool {tuple(similarity_KML.shape[:2])}, got {valid_KM.dtype} {tuple(valid_KM.shape)}")
    expected = (similarity_KML.shape[0], similarity_KML.shape[2])
    if prototype_marginal_KL is not None and prototype_marginal_KL.shape != expected:
        raise ValueError(f"prototype_marginal must be {expected}, got {tuple(prototype_marginal_KL.shape)}")
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if num_iterations < 0:
        raise ValueError(f"num_iterations must not be negative, got {num_iterations}")
