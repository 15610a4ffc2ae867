"""The ellipse that pseudo masks of few cells lean on."""

import pytest
import torch
from test_pseudo_masks import assert_same_masks, random_scene, ready_bank

from sim_hf.mask_generation import PseudoMaskGenerator
from sim_hf.mask_generation.box_cells import box_cells
from sim_hf.mask_generation.self_correction import masks_outside_of_boxes
from sim_hf.mask_generation.small_objects import ellipse_shares, mark_small_objects, smallness
from sim_hf.structures import InstanceTargets, PseudoMasks

STRIDE = 4.0


def slow_shares(box, height, width, samples=16):
    """Share of each cell, from a fine grid of points."""
    x1, y1, x2, y2 = box
    ticks = (torch.arange(width * samples) + 0.5) * STRIDE / samples, (torch.arange(height * samples) + 0.5) * STRIDE / samples
    x = (ticks[0] - (x1 + x2) / 2) / ((x2 - x1) / 2)
    y = (ticks[1] - (y1 + y2) / 2) / ((y2 - y1) / 2)
    inside = (x[None].square() + y[:, None].square() < 1).float()
    return torch.nn.functional.avg_pool2d(inside[None, None], samples)[0, 0]


@pytest.mark.parametrize("box", [[4, 4, 20, 20], [3, 5, 25, 14], [6.5, 2.5, 15, 27], [0, 0, 32, 32]])
def test_the_shares_are_those_of_fine_sampling(box):
    boxes = torch.tensor([box], dtype=torch.float32)
    cells = box_cells(boxes, 8, 8, STRIDE)
    shares = torch.zeros(1, 8, 8)
    cells.paint(ellipse_shares(boxes, cells, STRIDE), shares)
    expected = slow_shares(box, 8, 8)
    inside = torch.zeros(1, 8, 8)
    cells.paint(torch.ones(len(cells.cells_V)), inside)
    assert ((shares[0] - expected).abs() * inside[0]).max() < 0.15
    assert shares.sum().item() == pytest.approx((expected * inside[0]).sum().item(), rel=0.06)


def test_smallness_by_hand():
    boxes = torch.tensor([[0, 0, 12, 12], [0, 0, 9, 36], [0, 0, 24, 24], [5, 5, 6, 6], [7, 7, 7, 9]], dtype=torch.float32)
    assert smallness(boxes, STRIDE).tolist() == [1, 0.5, 0, 1, 1]  # sides of 3, 4.5, 6, a quarter and no cell


@pytest.mark.parametrize("box", [[13.0, 13.0, 14.0, 14.0], [6.0, 2.0, 7.0, 30.0], [10.0, 10.0, 10.0, 10.0]])
def test_a_box_of_a_pixel_or_a_line_has_a_middle(box):
    boxes = torch.tensor([box])
    shares = ellipse_shares(boxes, box_cells(boxes, 8, 8, STRIDE), STRIDE)
    assert shares.isfinite().all() and shares.max() > 0.5


def test_small_boxes_trust_a_rim_around_the_cells_they_touch():
    boxes = torch.tensor([[5.0, 4.0, 12.0, 13.0], [0.0, 0.0, 33.0, 33.0]])
    masks = masks_outside_of_boxes(torch.tensor([True, True]), (9, 9))
    mark_small_objects(masks, boxes, STRIDE)
    assert masks.smallness_G[0] == 1 and masks.smallness_G[1] == 0
    rim = torch.zeros(9, 9, dtype=torch.bool)
    rim[:5, :5] = True  # two cells beyond the box, as far as the grid goes
    rim[1:4, 1:3] = False  # every cell that the box touches: those inside are painted over afterwards
    assert torch.equal(masks.trusted_GHW[0], rim) and masks.trusted_GHW[1].all()


def test_small_objects_are_their_ellipse_and_large_ones_what_they_were():
    teacher, targets = random_scene()
    boxes_G4 = targets.boxes_G4.clone()
    boxes_G4[:4, 2:] = boxes_G4[:4, :2] + 11  # less than 3 cells a side
    boxes_G4[4:, 2:] = boxes_G4[4:, :2] + 33
    targets = InstanceTargets(boxes_G4, targets.class_labels_G, targets.image_ids_G, (64, 64), targets.num_images)
    bank = ready_bank()
    plain, leaning = (
        PseudoMaskGenerator(bank, small_ellipses=small)(teacher, targets, update_prototypes=False) for small in (False, True)
    )
    parts = PseudoMaskGenerator(bank, small_ellipses=True, chunk_size=2)(teacher, targets, update_prototypes=False)
    assert_same_masks(leaning, parts)
    assert leaning.smallness_G.tolist() == [1.0] * 4 + [0.0] * 5 and plain.smallness_G.tolist() == [0.0] * 9
    assert torch.equal(leaning.probabilities_GHW[4:], plain.probabilities_GHW[4:])
    assert torch.equal(leaning.trusted_GHW[4:], plain.trusted_GHW[4:])
    cells = box_cells(boxes_G4, 16, 16, STRIDE)
    expected = torch.zeros(9, 16, 16)
    cells.paint(ellipse_shares(boxes_G4, cells, STRIDE), expected)
    torch.testing.assert_close(leaning.probabilities_GHW[:4], expected[:4])


def test_targets_of_small_objects_are_shares_and_none_of_their_cells_is_ignored():
    probabilities = torch.tensor([[[0.0, 0.5, 0.9]], [[0.0, 0.5, 0.9]]])
    target = probabilities > 0.7
    trusted = torch.tensor([[[False, False, True]], [[True, False, True]]])
    masks = PseudoMasks(probabilities, target, trusted, torch.tensor([0.9, 0.9]), torch.tensor([0.4, 0.0]))
    soft, counted = masks.soft_targets()
    torch.testing.assert_close(soft, torch.tensor([[[0.0, 0.5, 0.9]], [[0.0, 0.0, 1.0]]]))
    assert counted.tolist() == [[[False, True, True]], [[True, False, True]]]
    masks.trusted_GHW.zero_()  # instances without a prediction of the teacher
    assert not masks.soft_targets()[1].any()
