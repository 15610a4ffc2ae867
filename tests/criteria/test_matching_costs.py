"""Matching without masks: shadows, or boxes of the predicted masks; and any supervision can be told which."""

import pytest
import torch
from synthetic_outputs import GRID, STRIDE, make_targets
from torchvision.ops import generalized_box_iou

from factories import tiny_config
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.build import MATCHING_COSTS, build_criterion
from sim_hf.criteria.matching_costs import box_matching_cost, generalized_iou, projection_matching_cost
from sim_hf.structures import box_masks
from sim_hf.training.arguments import SupervisionArguments


def filled(targets):
    return 80.0 * box_masks(targets.boxes_G4, *GRID, STRIDE).float() - 40.0


def test_cost_of_a_hand_computed_box():
    # Input 40 x 32 (width x height). The mask's box is x 8..24, y 8..24; the given one x 16..32, y 8..24.
    targets = make_targets([[16, 8, 32, 24]], [0], [0], num_images=1)
    logits = torch.full((1, *GRID), -1.0)
    logits[0, 2:6, 2:6] = 1.0
    distance = 8 / 40  # of the centres, along x
    overlap, union, hull = 8 * 16, 3 * 8 * 16, 24 * 16
    giou = overlap / union - (hull - union) / hull
    assert box_matching_cost(logits, targets).item() == pytest.approx((5 * distance + 2 * (1 - giou)) / 5, rel=1e-5)


@pytest.mark.parametrize("cost", [box_matching_cost, projection_matching_cost])
def test_cost_is_zero_for_the_filled_box_and_larger_for_any_other(cost):
    targets = make_targets()
    cost_QG = cost(filled(targets), targets)
    assert cost_QG.diagonal().tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert ((cost_QG > 0.05) | torch.eye(3, dtype=torch.bool)).all()


def test_the_projection_cost_is_that_of_boxinst():
    targets, logits = make_targets(), torch.randn(4, *GRID)
    assert torch.equal(
        projection_matching_cost(logits, targets), BoxInstCriterion().matching_cost(logits, targets, global_step=0)
    )


def test_generalized_iou_is_that_of_torchvision():
    corners = torch.rand(9, 2, 2).sort(1).values.flatten(1)
    torch.testing.assert_close(generalized_iou(corners[:4], corners[4:]), generalized_box_iou(corners[:4], corners[4:]))


def test_empty_masks_cost_something_finite():
    targets = make_targets([[12, 12, 12, 12], [0, 0, 40, 32]], [0, 1], [0, 0], num_images=1)  # one without area
    cost_QG = box_matching_cost(torch.full((3, *GRID), -5.0), targets)
    assert cost_QG.shape == (3, 2) and cost_QG.isfinite().all() and (cost_QG > 0.5).all()
    assert box_matching_cost(torch.randn(3, *GRID), make_targets([], num_images=1)).shape == (3, 0)


@pytest.mark.parametrize("supervision", ["full", "boxinst", "level_set", "bbtp", "sim"])
@pytest.mark.parametrize("matching", sorted(MATCHING_COSTS))
def test_every_supervision_matches_as_it_is_told(supervision, matching):
    arguments = SupervisionArguments(supervision=supervision, matching=matching)
    criterion = build_criterion(arguments, tiny_config(), steps=round)
    targets = make_targets()
    targets.masks_GHW = torch.zeros(3, *targets.input_size, dtype=torch.bool)
    logits = torch.randn(4, *GRID)
    cost_QG = criterion.matcher.mask_criterion.matching_cost(logits, targets, global_step=0)
    chosen = MATCHING_COSTS[matching]
    expected = (
        criterion.mask_criterion.matching_cost(logits, targets, global_step=0) if chosen is None else chosen(logits, targets)
    )
    assert torch.equal(cost_QG, expected)
    assert (criterion.matcher.class_cost, criterion.matcher.mask_cost) == (2.0, 5.0)


def test_projections_of_whole_cells_are_matched_as_such():
    arguments = SupervisionArguments(supervision="full", matching="projections", exact_box_edges=False)
    targets, logits = make_targets([[3, 5, 29, 22]], [0], [0], num_images=1), torch.randn(4, *GRID)
    cost_QG = build_criterion(arguments, tiny_config(), steps=round).matcher.mask_criterion.matching_cost(
        logits, targets, global_step=0
    )
    assert torch.equal(cost_QG, projection_matching_cost(logits, targets, exact_box_edges=False))
    assert not torch.equal(cost_QG, projection_matching_cost(logits, targets))


def test_soft_assignment_reaches_the_prototypes():
    for hard in (True, False):
        arguments = SupervisionArguments(hard_assignment=hard)
        assert build_criterion(arguments, tiny_config(), steps=round).mask_criterion.bank.hard_assignment is hard


def test_balanced_assignment_reaches_the_prototypes():
    for balanced in (False, True):
        arguments = SupervisionArguments(balanced_assignment=balanced)
        assert build_criterion(arguments, tiny_config(), steps=round).mask_criterion.bank.balanced is balanced
