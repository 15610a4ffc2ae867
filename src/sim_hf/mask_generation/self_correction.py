"""Self-correction of the semantic map by the instance map, and the two thresholds (SIM, Eq. 7).

Shape letters: G instances, V values inside the threshold band, H W mask grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.structures import PseudoMasks, box_masks


@torch.no_grad()
def self_correction(
    semantic_GHW: Tensor,
    instance_GHW: Tensor,
    boxes_G4: Tensor,
    *,
    stride: float,
    alpha: float = 0.5,
    confident: float = 0.7,
    high_range: tuple[float, float] = (0.7, 0.8),
    low: float = 0.4,
    semantic_ready_G: Tensor | None = None,
    has_positives_G: Tensor | None = None,
) -> PseudoMasks:
    """M = (1 - alpha) M_S + alpha M_I inside the box: foreground above tau_high, background below `low`, ignored between.

    Outside its box an instance is trusted background: the box says so. tau_high is chosen per instance within `high_range`
    such that as many pixels pass as the teacher is sure of (M_I above `confident`). The paper gives no numbers; the rule and
    its numbers are those of the authors' code. `semantic_ready_G`: instances whose class has prototypes (all by default); the
    others use M_I alone. `has_positives_G`: instances with a prediction (by default those whose M_I is not 0 everywhere);
    nothing of the others is trusted.
    """
    _check_arguments(semantic_GHW, instance_GHW, boxes_G4, alpha, high_range, low)
    height, width = instance_GHW.shape[-2:]
    semantic_GHW, instance_GHW = semantic_GHW.float(), instance_GHW.float()
    inside_GHW = box_masks(boxes_G4, height, width, stride)
    if has_positives_G is None:
        has_positives_G = (instance_GHW > 0).flatten(1).any(-1)

    alpha_G = torch.full((len(boxes_G4),), alpha, device=instance_GHW.device)
    if semantic_ready_G is not None:
        alpha_G = torch.where(semantic_ready_G, alpha_G, 1.0)
    corrected_GHW = torch.lerp(semantic_GHW, instance_GHW, alpha_G[:, None, None])
    corrected_GHW = corrected_GHW.masked_fill_(~inside_GHW, 0.0)

    num_confident_G = ((instance_GHW > confident) & inside_GHW).sum((1, 2))
    high_G = adaptive_threshold(corrected_GHW, num_confident_G, high_range)
    # A NaN is neither above nor below, so it is ignored.
    foreground_GHW = corrected_GHW > high_G[:, None, None]
    trusted_GHW = (foreground_GHW | (corrected_GHW < low)) & has_positives_G[:, None, None]
    target_GHW = foreground_GHW & has_positives_G[:, None, None]
    scores_G = torch.where(target_GHW, corrected_GHW, 0.0).sum((1, 2)) / target_GHW.sum((1, 2)).clamp(min=1)
    return PseudoMasks(corrected_GHW.nan_to_num(0.0), target_GHW, trusted_GHW, scores_G)


@torch.no_grad()
def adaptive_threshold(values_GHW: Tensor, num_wanted_G: Tensor, limits: tuple[float, float]) -> Tensor:
    """The value that exactly `num_wanted_G` values of an instance exceed (up to ties), clamped to `limits`. -> (G,)

    That is the value of rank `num_wanted_G` in descending order, counted from 0. Because of the clamp only the values
    between the limits need sorting.
    """
    lowest, highest = limits
    above_GHW = values_GHW > highest
    band_GHW = (values_GHW > lowest) & ~above_GHW
    num_band_G = band_GHW.sum((1, 2))
    rank_in_band_G = num_wanted_G - above_GHW.sum((1, 2))
    threshold_G = torch.full_like(values_GHW[:, 0, 0], lowest)
    threshold_G = threshold_G.masked_fill_(rank_in_band_G < 0, highest)

    values_V = values_GHW[band_GHW]
    owners_V = torch.repeat_interleave(num_band_G)  # boolean indexing reads row by row: values come instance by instance
    order_V = values_V.argsort(descending=True)
    order_V = order_V[owners_V[order_V].argsort(stable=True)]
    has_value_G = (rank_in_band_G >= 0) & (rank_in_band_G < num_band_G)
    position_G = (num_band_G.cumsum(0) - num_band_G) + rank_in_band_G
    threshold_G[has_value_G] = values_V[order_V[position_G[has_value_G]]]
    return threshold_G


def _check_arguments(
    semantic_GHW: Tensor,
    instance_GHW: Tensor,
    boxes_G4: Tensor,
    alpha: float,
    high_range: tuple[float, float],
    low: float,
) -> None:
    if semantic_GHW.shape != instance_GHW.shape or len(instance_GHW) != len(boxes_G4):
        raise ValueError(
            "semantic map, instance map and boxes must be (G, H, W), (G, H, W) and (G, 4), got "
            f"{tuple(semantic_GHW.shape)}, {tuple(instance_GHW.shape)} and {tuple(boxes_G4.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not 0 < low <= high_range[0] <= high_range[1]:
        raise ValueError(f"thresholds must be 0 < low <= high_range[0] <= high_range[1], got {low} and {high_range}")
