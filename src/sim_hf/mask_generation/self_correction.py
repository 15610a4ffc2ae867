"""Self-correction of the semantic map by the instance map, and the two thresholds (SIM, Eq. 7).

Shape letters: G instances, V cells inside their boxes (instance by instance), T those between the two limits of the
threshold, H W mask grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.mask_generation.box_cells import BoxCells, box_cells
from sim_hf.structures import PseudoMasks


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
    if has_positives_G is None:
        has_positives_G = (instance_GHW > 0).flatten(1).any(-1)
    if semantic_ready_G is None:
        semantic_ready_G = torch.ones_like(has_positives_G)
    _, height, width = instance_GHW.shape
    cells = box_cells(boxes_G4, height, width, stride)
    masks = masks_outside_of_boxes(has_positives_G, cells.grid_size)
    correct_cells(
        cells.pick(semantic_GHW).float(),
        cells.pick(instance_GHW).float(),
        cells,
        masks,
        alpha_G=torch.where(semantic_ready_G, alpha, 1.0),
        has_positives_G=has_positives_G,
        confident=confident,
        high_range=high_range,
        low=low,
    )
    return masks


def masks_outside_of_boxes(has_positives_G: Tensor, grid_size: tuple[int, int]) -> PseudoMasks:
    """Trusted background everywhere, for instances with positives: what `correct_cells` paints the boxes into."""
    shape, device = (len(has_positives_G), *grid_size), has_positives_G.device
    return PseudoMasks(
        probabilities_GHW=torch.zeros(shape, device=device),
        target_GHW=torch.zeros(shape, dtype=torch.bool, device=device),
        trusted_GHW=has_positives_G[:, None, None].expand(shape).contiguous(),
        scores_G=torch.zeros(len(has_positives_G), device=device),
        smallness_G=torch.zeros(len(has_positives_G), device=device),
    )


@torch.no_grad()
def correct_cells(
    semantic_V: Tensor,
    instance_V: Tensor,
    cells: BoxCells,
    masks: PseudoMasks,
    *,
    alpha_G: Tensor,
    has_positives_G: Tensor,
    confident: float = 0.7,
    high_range: tuple[float, float] = (0.7, 0.8),
    low: float = 0.4,
    ellipse_V: Tensor | None = None,
) -> None:
    """`self_correction` of the cells inside the boxes, painted into `masks`, those of the cells' instances. ellipse_V: what
    instances lean on as far as `masks.smallness_G` says."""
    corrected_V = torch.lerp(semantic_V, instance_V, cells.spread(alpha_G))
    if ellipse_V is not None:
        corrected_V = torch.lerp(corrected_V, ellipse_V, cells.spread(masks.smallness_G))
    high_G = _threshold(corrected_V, cells.instances_V, cells.total(instance_V > confident), high_range)
    # A NaN is neither above nor below, so it is ignored.
    foreground_V = corrected_V > cells.spread(high_G)
    has_positives_V = cells.spread(has_positives_G)
    target_V = foreground_V & has_positives_V
    trusted_V = (foreground_V | (corrected_V < low)) & has_positives_V
    probabilities_V = corrected_V.nan_to_num_(0.0)
    cells.paint(probabilities_V, masks.probabilities_GHW)
    cells.paint(target_V, masks.target_GHW)
    cells.paint(trusted_V, masks.trusted_GHW)
    masks.scores_G.copy_(cells.total(probabilities_V * target_V) / cells.total(target_V).clamp(min=1))


@torch.no_grad()
def adaptive_threshold(values_GHW: Tensor, num_wanted_G: Tensor, limits: tuple[float, float]) -> Tensor:
    """The value that exactly `num_wanted_G` values of an instance exceed (up to ties), clamped to `limits`. -> (G,)"""
    instances_V = torch.arange(len(values_GHW), device=values_GHW.device).repeat_interleave(values_GHW.shape[1:].numel())
    return _threshold(values_GHW.flatten(), instances_V, num_wanted_G, limits)


def _threshold(values_V: Tensor, instances_V: Tensor, num_wanted_G: Tensor, limits: tuple[float, float]) -> Tensor:
    """`adaptive_threshold` of the listed values; those that are not listed lie below both limits. -> (G,)

    The value of rank `num_wanted_G` in descending order, counted from 0. Because of the clamp only the values between the
    limits need sorting.
    """
    (lowest, highest), num_instances = limits, len(num_wanted_G)
    above_V = values_V > highest
    num_above_G = num_wanted_G.new_zeros(num_instances).index_add_(0, instances_V, above_V.long())
    places_T = ((values_V > lowest) & ~above_V).nonzero()[:, 0]
    values_T, owners_T = values_V.index_select(0, places_T), instances_V.index_select(0, places_T)
    num_band_G = owners_T.bincount(minlength=num_instances)
    rank_in_band_G = num_wanted_G - num_above_G
    threshold_G = values_V.new_full((num_instances,), lowest)
    threshold_G = threshold_G.masked_fill_(rank_in_band_G < 0, highest)

    order_T = values_T.argsort(descending=True)
    order_T = order_T[owners_T[order_T].argsort(stable=True)]
    has_value_G = (rank_in_band_G >= 0) & (rank_in_band_G < num_band_G)
    position_G = (num_band_G.cumsum(0) - num_band_G) + rank_in_band_G
    threshold_G[has_value_G] = values_T[order_T[position_G[has_value_G]]]
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
