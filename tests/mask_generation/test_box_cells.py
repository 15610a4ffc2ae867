"""The list of cells inside boxes, and that working on it changes no value."""

import pytest
import torch

from sim_hf.mask_generation import positive_mask_weighting
from sim_hf.mask_generation.box_cells import box_cells
from sim_hf.mask_generation.positive_mask_weighting import (
    instance_probabilities,
    instance_probability_map,
    positives_by_instance,
)
from sim_hf.mask_generation.prototype_bank import PrototypeBank
from sim_hf.mask_generation.semantic_map import ClassSimilarity, semantic_probability_map
from sim_hf.structures import InstanceTargets, box_masks


def random_boxes(num_boxes=20):
    """On a grid of 12 x 10 cells of 4 pixels; some reach beyond it, some have no centre of a cell inside."""
    corner_G2 = torch.rand(num_boxes, 2) * 44 - 4
    return torch.cat([corner_G2, corner_G2 + 0.5 + torch.rand(num_boxes, 2) * 24], 1)


def test_cells_by_hand():
    cells = box_cells(torch.tensor([[4.0, 0.0, 12.0, 8.0], [13.0, 9.0, 14.0, 10.0]]), 3, 5, 4.0)
    assert cells.instances_V.tolist() == [0, 0, 0, 0, 1]
    assert cells.cells_V.tolist() == [1, 2, 6, 7, 13]  # the second box has no centre inside: the cell of its middle


def test_cells_are_those_of_the_box_masks_in_their_order():
    boxes_G4 = random_boxes()
    cells = box_cells(boxes_G4, 12, 10, 4.0)
    instances_V, cells_V = box_masks(boxes_G4, 12, 10, 4.0).flatten(1).nonzero(as_tuple=True)
    assert torch.equal(cells.instances_V, instances_V) and torch.equal(cells.cells_V, cells_V)


def test_pick_and_paint_are_inverse():
    boxes_G4 = random_boxes()
    cells, maps_GHW, painted_GHW = box_cells(boxes_G4, 12, 10, 4.0), torch.rand(20, 12, 10), torch.zeros(20, 12, 10)
    cells.paint(cells.pick(maps_GHW), painted_GHW)
    assert torch.equal(painted_GHW, maps_GHW * box_masks(boxes_G4, 12, 10, 4.0))
    picked_V = cells.pick(maps_GHW[:2], torch.arange(20) % 2)
    assert torch.equal(picked_V, cells.pick(maps_GHW[torch.arange(20) % 2]))


def test_totals_by_hand():
    cells = box_cells(torch.tensor([[4.0, 0.0, 12.0, 8.0], [13.0, 9.0, 14.0, 10.0]]), 3, 5, 4.0)
    assert cells.total(torch.tensor([1.0, 2.0, 3.0, 4.5, 7.0])).tolist() == [10.5, 7.0]
    assert cells.total(torch.tensor([True, False, True, True, False])).tolist() == [3, 0]


def test_no_boxes():
    cells = box_cells(torch.zeros(0, 4), 3, 5, 4.0)
    assert len(cells.cells_V) == 0 and cells.total(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("positives_at_a_time", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_instance_probabilities_equal_the_whole_map(dtype, positives_at_a_time, monkeypatch):
    boxes_G4, logits_NHW = random_boxes(), (torch.randn(35, 12, 10) * 4).to(dtype)
    logits_NHW[0] = torch.nan  # spoils its own instance only, and stands in for nobody else's missing positive
    instance_ids_N, weights_N = torch.randint(0, 19, (35,)), torch.rand(35)  # the last instance has no positive
    cells = box_cells(boxes_G4, 12, 10, 4.0)
    monkeypatch.setattr(positive_mask_weighting, "_CELLS_AT_A_TIME", positives_at_a_time * len(cells.cells_V))
    map_V = instance_probabilities(logits_NHW, positives_by_instance(instance_ids_N, 20), weights_N, cells)
    expected_V = cells.pick(instance_probability_map(logits_NHW, weights_N, instance_ids_N, 20))
    assert torch.equal(map_V.isnan(), cells.spread(torch.arange(20) == instance_ids_N[0]))
    # Not bit by bit: torch's sigmoid differs in the last bit between the vector registers and the rest of a tensor.
    torch.testing.assert_close(map_V, expected_V, rtol=1e-6, atol=0, equal_nan=True)


def test_semantic_probabilities_equal_the_whole_map():
    bank = PrototypeBank(3, 4, 6)
    bank.prototypes_KLC.copy_(torch.nn.functional.normalize(torch.randn(3, 4, 6), dim=-1))
    image_ids_G = torch.arange(20) // 10
    targets = InstanceTargets(random_boxes(), torch.randint(0, 3, (20,)), image_ids_G, (48, 40), 2)
    features_BCHW, cells = torch.randn(2, 6, 12, 10), box_cells(targets.boxes_G4[5:], 12, 10, 4.0)
    map_V = ClassSimilarity(features_BCHW, bank, targets).probabilities(cells, slice(5, 20))
    expected_V = cells.pick(semantic_probability_map(features_BCHW, bank, targets)[5:])
    torch.testing.assert_close(map_V, expected_V, rtol=1e-6, atol=0)
