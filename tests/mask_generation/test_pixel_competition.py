"""Pixels of overlapping boxes: shared by mask and place, independent of chunks and of other images."""

import pytest
import torch
from references_mask_generation import pixel_shares as slow_pixel_shares
from test_pseudo_masks import random_scene, ready_bank

from sim_hf.mask_generation import PseudoMaskGenerator
from sim_hf.mask_generation.box_cells import box_cells
from sim_hf.mask_generation.pixel_competition import PixelCompetition, centrality, pixel_share
from sim_hf.structures import InstanceTargets, MaskPredictions, box_masks

GRID, STRIDE = (16, 16), 4.0


def shares_of(instance_GHW, boxes_G4, image_ids_G, *, chunk=100):
    """Shares on the grid, 1 outside of the boxes."""
    num_images = int(image_ids_G.max()) + 1 if len(image_ids_G) else 1
    competition = PixelCompetition(num_images, GRID, STRIDE, torch.device("cpu"))
    parts = [slice(start, start + chunk) for start in range(0, len(boxes_G4), chunk)]
    shares_GHW = torch.ones_like(instance_GHW)
    for part in parts:
        cells = box_cells(boxes_G4[part], *GRID, STRIDE)
        competition.enter(cells, cells.pick(instance_GHW[part]), boxes_G4[part], image_ids_G[part])
    for part in parts:
        cells = box_cells(boxes_G4[part], *GRID, STRIDE)
        shares_V = competition.shares(cells, cells.pick(instance_GHW[part]), boxes_G4[part], image_ids_G[part])
        cells.paint(shares_V, shares_GHW[part])
    return shares_GHW


def random_instances(count=8, num_images=2):
    corners = torch.rand(count, 2) * 36
    boxes = torch.cat([corners, corners + 6 + torch.rand(count, 2) * 22], dim=1)
    return torch.rand(count, *GRID) * box_masks(boxes, *GRID, STRIDE), boxes, torch.arange(count) % num_images


def test_shares_by_hand():
    score, rival = torch.tensor([0.6, 0.3, 0.3, 0.0, 0.0, 0.5]), torch.tensor([0.2, 0.3, 0.9, 0.4, 0.0, 0.0])
    assert pixel_share(score, rival).tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0, 1.0, 1.0])
    places = torch.tensor([0.0, 0.25, 1.0, 1.25, 2.0])
    assert centrality(places, torch.zeros(5)).tolist() == pytest.approx([1.0, 1.0, 0.25, 0.0, 0.0])
    assert float(centrality(torch.tensor(0.6), torch.tensor(-0.8))) == pytest.approx(0.25)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equals_a_slow_loop_for_every_chunk(chunk):
    instance_GHW, boxes, images = random_instances()
    expected = torch.from_numpy(slow_pixel_shares(instance_GHW.numpy(), boxes.tolist(), images.tolist(), STRIDE)).float()
    inside_GHW = box_masks(boxes, *GRID, STRIDE)
    found = shares_of(instance_GHW, boxes, images, chunk=chunk)
    torch.testing.assert_close(found[inside_GHW], expected[inside_GHW], rtol=1e-5, atol=1e-6)
    assert (found[inside_GHW] < 1).any() and (found[~inside_GHW] == 1).all()


def test_where_two_masks_say_the_same_the_nearer_middle_keeps_the_pixel():
    boxes = torch.tensor([[0.0, 16.0, 40.0, 48.0], [24.0, 16.0, 64.0, 48.0]])  # columns 6..9 are in both
    instance_GHW = 0.9 * box_masks(boxes, *GRID, STRIDE)
    left, right = shares_of(instance_GHW, boxes, torch.tensor([0, 0]))[:, 8]
    assert left[:6].tolist() == [1.0] * 6 and right[10:].tolist() == [1.0] * 6
    assert left[6] == 1 and left[9] < 0.6 and right[6] < 0.6 and right[9] == 1
    torch.testing.assert_close(left, right.flip(0))


def test_alone_in_the_image_nothing_is_shared():
    instance_GHW, boxes, _ = random_instances(5)
    assert (shares_of(instance_GHW, boxes, torch.arange(5)) == 1).all()


def test_equal_boxes_with_equal_masks_both_keep_everything():
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]] * 2)
    assert (shares_of(0.8 * box_masks(boxes, *GRID, STRIDE), boxes, torch.tensor([0, 0])) == 1).all()


def test_no_instance_a_one_pixel_box_and_a_box_in_the_padding():
    assert shares_of(torch.zeros(0, *GRID), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 16, 16)
    boxes = torch.tensor([[10.0, 10.0, 11.0, 11.0], [0.0, 0.0, 64.0, 64.0], [70.0, 70.0, 90.0, 90.0]])
    found = shares_of(0.9 * box_masks(boxes, *GRID, STRIDE), boxes, torch.tensor([0, 0, 0]))
    assert found.isfinite().all() and found[0, 2, 2] == 1 and found[1, 2, 2] < 1


def test_a_prediction_that_is_not_a_number_takes_nothing_from_others():
    instance_GHW, boxes, images = random_instances(4, num_images=1)
    instance_GHW[0] = float("nan")
    found = shares_of(instance_GHW, boxes, images)
    instance_GHW[0] = 0.0
    torch.testing.assert_close(found[1:], shares_of(instance_GHW, boxes, images)[1:])


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_pseudo_masks_do_not_depend_on_chunks(chunk_size):
    bank, scene = ready_bank(), random_scene()
    whole = PseudoMaskGenerator(bank, pixel_competition=True, chunk_size=100)(*scene, update_prototypes=False)
    parts = PseudoMaskGenerator(bank, pixel_competition=True, chunk_size=chunk_size)(*scene, update_prototypes=False)
    torch.testing.assert_close(parts.probabilities_GHW, whole.probabilities_GHW, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.scores_G, whole.scores_G, rtol=0, atol=1e-6)
    paper = PseudoMaskGenerator(bank)(*scene, update_prototypes=False)
    assert (whole.probabilities_GHW <= paper.probabilities_GHW + 1e-6).all()
    assert (whole.probabilities_GHW < paper.probabilities_GHW - 0.1).any()


def test_merged_neighbours_come_apart():
    """The teacher has one mask for two touching objects of a class; the paper's pseudo masks keep it for both."""
    boxes = torch.tensor([[0.0, 16.0, 36.0, 48.0], [28.0, 16.0, 64.0, 48.0]])
    targets = InstanceTargets(boxes, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (64, 64), 1)
    logits = torch.full((2, 16, 16), -6.0)
    logits[:, 4:12] = 4.0
    teacher = MaskPredictions(logits, torch.tensor([0, 1]), torch.ones(2), torch.randn(1, 8, 16, 16))
    bank = ready_bank()
    bank.counts_KL.zero_()  # no prototypes: M is M_I
    paper = PseudoMaskGenerator(bank)(teacher, targets, update_prototypes=False)
    ours = PseudoMaskGenerator(bank, pixel_competition=True)(teacher, targets, update_prototypes=False)
    assert paper.target_GHW.all(0).sum() == 8 * 2  # columns 7 and 8 are in both boxes, and in both masks
    assert ours.target_GHW.all(0).sum() == 8  # halfway up, where the scores are nearest to a tie, both keep them
    assert ours.target_GHW.any(0).sum() == 8 * 16
