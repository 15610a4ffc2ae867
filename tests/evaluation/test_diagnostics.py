"""Diagnostics by hand: 20 x 20 grids whose boxes and masks can be counted."""

import pytest
import torch

from sim_hf.evaluation.diagnostics import (
    collapse_warning,
    instance_diagnostics,
    mask_diagnostics,
    shape_similarity,
)
from sim_hf.structures import box_masks

STRIDE = 4
WHOLE = [0, 0, 80, 80]  # 20 x 20 cells: corner patches are 3 x 3 cells, the middle third is 6 x 6


def one(mask_HW, box=WHOLE):
    values = instance_diagnostics(mask_HW[None], torch.tensor([box], dtype=torch.float32), STRIDE)
    return {name: value.item() for name, value in values.items()}


def disc(size=20, radius=10.0):
    cells = torch.arange(size) + 0.5 - size / 2
    return cells[:, None] ** 2 + cells[None, :] ** 2 <= radius**2


def test_box_filling_mask_has_full_fill_corners_and_centre_and_no_leak():
    assert one(torch.ones(20, 20, dtype=torch.bool)) == {"fill": 1.0, "corners": 1.0, "centre": 1.0, "leak": 0.0}


def test_disc_leaves_the_corners_free():
    values = one(disc())
    assert values["fill"] == pytest.approx(disc().sum().item() / 400)
    assert values["corners"] < 0.1 and values["centre"] == 1.0 and values["leak"] == 0.0


def test_one_of_four_corner_patches_is_a_quarter():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[:3, 17:] = True
    assert one(mask) == pytest.approx({"fill": 9 / 400, "corners": 0.25, "centre": 0.0, "leak": 0.0})


def test_centre_is_the_middle_third():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[7:13, 7:10] = True
    assert one(mask)["centre"] == pytest.approx(0.5)


def test_leak_is_the_share_of_the_mass_outside():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[0:2, 0:8] = True
    values = one(mask, box=[0, 0, 24, 40])  # 6 of the 8 columns are inside
    assert values["leak"] == pytest.approx(0.25)
    assert values["fill"] == pytest.approx(12 / 60)


def test_empty_mask_has_no_leak_and_no_fill():
    assert one(torch.zeros(20, 20)) == {"fill": 0.0, "corners": 0.0, "centre": 0.0, "leak": 0.0}


def test_probabilities_count_by_their_value_in_any_float_type():
    values = instance_diagnostics(torch.full((1, 20, 20), 0.5, dtype=torch.bfloat16), torch.tensor([WHOLE]).float(), STRIDE)
    assert {name: value.item() for name, value in values.items()} == {"fill": 0.5, "corners": 0.5, "centre": 0.5, "leak": 0.0}


def test_box_of_one_cell_is_its_own_corner_and_centre():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[5, 5] = True
    assert one(mask, box=[20, 20, 24, 24]) == {"fill": 1.0, "corners": 1.0, "centre": 1.0, "leak": 0.0}


def test_no_instances_give_an_empty_dict_and_no_warning():
    assert mask_diagnostics(torch.zeros(0, 20, 20), torch.zeros(0, 4), STRIDE) == {}
    assert collapse_warning({}) is None


def test_boxes_of_few_cells_do_not_count():
    masks = torch.ones(2, 20, 20)
    assert mask_diagnostics(masks[:1], torch.tensor([[0.0, 0.0, 12.0, 80.0]]), STRIDE) == {}
    boxes = torch.tensor([[0.0, 0.0, 12.0, 80.0], WHOLE])
    diagnostics = mask_diagnostics(masks, boxes, STRIDE)
    assert diagnostics["num_instances"] == 1 and diagnostics["leak"] == 0.0 and "shape_similarity" not in diagnostics


def test_means_are_over_instances_and_finite():
    masks = torch.stack([torch.ones(20, 20), torch.zeros(20, 20)])
    diagnostics = mask_diagnostics(masks, torch.tensor([WHOLE, WHOLE]).float(), STRIDE)
    assert diagnostics["fill"] == 0.5 and diagnostics["num_instances"] == 2
    assert all(value.isfinite() for value in diagnostics.values())


def test_equal_shapes_of_different_sizes_are_similar_and_halves_are_not():
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, :, :10] = True  # the left half of the whole
    masks[1, 4:12, 4:8] = True  # the left half of a box of 8 x 8 cells
    boxes = torch.tensor([WHOLE, [16, 16, 48, 48]]).float()
    assert shape_similarity(masks, boxes, STRIDE) == 1.0
    masks[1, 4:12] = False
    masks[1, 4:12, 8:12] = True
    assert shape_similarity(masks, boxes, STRIDE) == 0.0
    masks[1, 4:12, 4:12] = True  # half against whole
    assert shape_similarity(masks, boxes, STRIDE) == 0.5


def test_similarity_of_one_mask_is_refused():
    with pytest.raises(ValueError, match="two masks, got 1"):
        shape_similarity(torch.ones(1, 20, 20), torch.tensor([WHOLE]).float(), STRIDE)


def test_box_filling_is_warned_of_in_words():
    boxes = torch.tensor([WHOLE, [16, 16, 48, 48], [0, 0, 40, 80], [20, 40, 80, 80]]).float()
    warning = collapse_warning(mask_diagnostics(box_masks(boxes, 20, 20, STRIDE), boxes, STRIDE))
    assert warning.startswith("Masks fill their boxes: they cover 100%") and "pairwise" in warning


def test_one_shape_for_all_is_warned_of_in_words():
    boxes = torch.tensor([WHOLE] * 4).float()
    warning = collapse_warning(mask_diagnostics(disc().expand(4, 20, 20), boxes, STRIDE))
    assert warning.startswith("All masks have nearly the same shape") and "IoU 1.00" in warning


def test_healthy_masks_and_too_few_of_them_give_no_warning():
    boxes = torch.tensor([WHOLE] * 4).float()
    masks = torch.stack([disc(), disc().tril(), disc().triu(), torch.ones(20, 20, dtype=torch.bool).tril()])
    assert collapse_warning(mask_diagnostics(masks, boxes, STRIDE)) is None
    assert collapse_warning(mask_diagnostics(torch.ones(3, 20, 20), boxes[:3], STRIDE)) is None


def test_wrong_shapes_say_what_came():
    with pytest.raises(ValueError, match=r"\(2, 20, 20\), \(1, 4\)"):
        instance_diagnostics(torch.ones(2, 20, 20), torch.zeros(1, 4), STRIDE)
