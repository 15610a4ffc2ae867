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
    scores_KML = similarity_KML.float()
    finite_KM = scores_KML.isfinite().all(-1)
    valid_KM1 = (finite_KM if valid_KM is None else finite_KM & valid_KM)[..., None]
    if scores_KML.numel() == 0:
        return torch.zeros_like(scores_KML)
    scores_KML = torch.where(valid_KM1, scores_KML, 0.0).div_(epsilon).clamp_(-_LARGEST_SCORE, _LARGEST_SCORE)

    # Only sums over valid pixels may see a pixel. A finite stand-in for log 0: a class without valid pixels stays finite.
    pixel_mask_KM1 = torch.where(valid_KM1, 0.0, _LOG_OF_NOTHING)
    log_marginal_K1L = _log_marginal(prototype_marginal_KL, scores_KML)
    prototype_potential_K1L = torch.zeros_like(log_marginal_K1L)
    pixel_potential_KM1 = pixel_mask_KM1
    for _ in range(num_iterations):
        received_K1L = torch.logsumexp(scores_KML + pixel_potential_KM1, dim=1, keepdim=True)
        prototype_potential_K1L = log_marginal_K1L - received_K1L
        # The pixels' 1/N_valid is one constant for all of a class: the next line of either kind absorbs it.
        brought_KM1 = torch.logsumexp(scores_KML + prototype_potential_K1L, dim=-1, keepdim=True)
        pixel_potential_KM1 = pixel_mask_KM1 - brought_KM1
    return torch.softmax(scores_KML + prototype_potential_K1L, dim=-1) * valid_KM1


def _log_marginal(prototype_marginal_KL: Tensor | None, scores_KML: Tensor) -> Tensor:
    """Logarithm of the prototypes' shares; uniform when not given, or where a class gives only zeros. -> (K, 1, L)"""
    num_classes, _, num_prototypes = scores_KML.shape
    uniform_KL = scores_KML.new_full((num_classes, num_prototypes), 1.0 / num_prototypes)
    if prototype_marginal_KL is None:
        return uniform_KL.log()[:, None, :]
    given_KL = prototype_marginal_KL.float()
    total_K1 = given_KL.sum(-1, keepdim=True)
    shares_KL = torch.where(total_K1 > 0, given_KL / total_K1, uniform_KL)
    return shares_KL.log()[:, None, :]


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
