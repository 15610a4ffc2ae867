"""The records and the box-to-grid rules that all layers share."""

import pytest
import torch

from sim_hf.structures import (
    CriterionOutput,
    InstanceTargets,
    box_iou_pairwise,
    box_masks,
    mask_boxes,
    rasterize_boxes,
)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def cells(occupied_L):
    return occupied_L.nonzero()[:, 0].tolist()


def label(*rows, classes=None, **extra):
    return {"boxes": boxes(*rows), "class_labels": torch.tensor(classes or [0] * len(rows), dtype=torch.int64), **extra}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 16, [0, 1, 2, 3]),
        (4, 12, [1, 2]),
        (1.9, 6.1, [0, 1]),  # centres lie at 2, 6, 10, 14
        (2.1, 5.9, [1]),  # no centre inside, one cell all the same
        (5, 6, [1]),
        (4.2, 4.4, [1]),
        (-8, 3, [0]),
        (13, 40, [3]),
        (50, 60, [3]),  # beyond the grid: the last cell
        (-9, -5, [0]),
    ],
)
def test_a_cell_belongs_to_a_box_when_its_centre_does(low, high, expected):
    rows_GH, columns_GW = rasterize_boxes(boxes([low, 0, high, 16]), 4, 4, 4.0)
    assert cells(columns_GW[0]) == expected
    assert cells(rows_GH[0]) == [0, 1, 2, 3]
    rows_GH, _ = rasterize_boxes(boxes([0, low, 16, high]), 4, 4, 4.0)
    assert cells(rows_GH[0]) == expected


def test_a_mirrored_box_has_the_mirrored_cells_also_where_an_edge_hits_a_centre():
    for low, high in [(2, 10), (6, 14), (2, 6), (4, 18), (1.5, 30)]:
        _, columns_GW = rasterize_boxes(boxes([low, 0, high, 32], [32 - high, 0, 32 - low, 32]), 8, 8, 4.0)
        assert torch.equal(columns_GW[0].flip(0), columns_GW[1]), (low, high)


@pytest.mark.parametrize(("low", "high"), [(2.5, 4.0), (6, 8), (2.1, 3.9)])
def test_a_box_inside_one_cell_keeps_that_cell(low, high):
    _, columns_GW = rasterize_boxes(boxes([low, 0, high, 16]), 4, 4, 4.0)
    assert cells(columns_GW[0]) == [int(low // 4)]


def test_box_masks_are_rows_times_columns():
    masks_GHW = box_masks(boxes([4, 8, 12, 16], [0, 0, 4, 4]), 4, 5, 4.0)
    expected = torch.zeros(2, 4, 5, dtype=torch.bool)
    expected[0, 2:4, 1:3] = True
    expected[1, 0, 0] = True
    assert torch.equal(masks_GHW, expected)


def test_no_box_gives_no_mask():
    assert box_masks(torch.zeros(0, 4), 3, 5, 4.0).shape == (0, 3, 5)


def test_mask_boxes_are_tight_and_half_open():
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    masks[1, 3, 5] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 5, 3], [5, 3, 6, 4], [0, 0, 0, 0]]
    assert mask_boxes(masks, stride=4.0)[0].tolist() == [8, 4, 20, 12]
    assert mask_boxes(masks[:0]).shape == (0, 4)


def test_mask_boxes_undo_box_masks():
    aligned = boxes([4, 8, 12, 16], [0, 0, 20, 4])
    assert torch.equal(mask_boxes(box_masks(aligned, 4, 5, 4.0), 4.0), aligned)


def test_box_iou_row_by_row():
    first = boxes([0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 1, 1])
    second = boxes([0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 4, 4], [1, 1, 1, 1])
    assert box_iou_pairwise(first, second).tolist() == pytest.approx([1, 1 / 3, 0, 0])


def test_from_labels_flattens_images_in_order_and_counts_the_empty_one():
    targets = InstanceTargets.from_labels(
        [label([0, 0, 4, 4], [1, 1, 5, 5], classes=[2, 0]), label(), label([2, 2, 3, 3], classes=[1])], (8, 8)
    )
    assert targets.num_images == 3
    assert targets.image_ids_G.tolist() == [0, 0, 2]
    assert targets.class_labels_G.tolist() == [2, 0, 1]
    assert targets.masks_GHW is None
    assert not targets.has_mask_G.any() and not targets.is_pasted_G.any()


def test_from_labels_of_a_batch_without_instances_keeps_shapes_and_types():
    targets = InstanceTargets.from_labels([label(), label()], (8, 8))
    assert len(targets) == 0 and targets.num_images == 2
    assert targets.boxes_G4.shape == (0, 4) and targets.boxes_G4.dtype == torch.float32
    assert targets.class_labels_G.dtype == targets.image_ids_G.dtype == torch.int64


def test_from_labels_of_no_image_at_all():
    targets = InstanceTargets.from_labels([], (8, 8))
    assert len(targets) == 0 and targets.num_images == 0


def test_images_with_and_without_masks_mix():
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, :4, :4] = True
    targets = InstanceTargets.from_labels(
        [
            label([0, 0, 4, 4], [0, 0, 4, 4], masks=mask, has_mask=torch.tensor([True, False])),
            label([1, 1, 2, 2]),
            label([0, 0, 4, 4], masks=mask[:1]),
        ],
        (8, 8),
    )
    assert targets.has_mask_G.tolist() == [True, False, False, True]
    assert targets.masks_GHW.shape == (4, 8, 8)
    assert not targets.masks_GHW[2].any()


def test_select_keeps_images_and_every_field_of_the_rows():
    mask = torch.rand(2, 8, 8) > 0.5
    targets = InstanceTargets.from_labels([label([0, 0, 4, 4], [1, 1, 5, 5], classes=[2, 1], masks=mask)], (8, 8))
    chosen = targets.select(torch.tensor([False, True]))
    assert chosen.num_images == 1 and chosen.input_size == (8, 8)
    assert chosen.boxes_G4.tolist() == [[1, 1, 5, 5]] and chosen.class_labels_G.tolist() == [1]
    assert torch.equal(chosen.masks_GHW, mask[1:]) and chosen.has_mask_G.tolist() == [True]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes_G4": torch.zeros(2, 3)}, "boxes must be"),
        ({"class_labels_G": torch.zeros(3, dtype=torch.int64)}, "expected 2 class labels"),
        ({"image_ids_G": torch.zeros(1, dtype=torch.int64)}, "expected 2 image ids"),
        ({"masks_GHW": torch.zeros(2, 4, 4, dtype=torch.bool)}, "masks must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(wrong, message):
    fields = {
        "boxes_G4": torch.zeros(2, 4),
        "class_labels_G": torch.zeros(2, dtype=torch.int64),
        "image_ids_G": torch.zeros(2, dtype=torch.int64),
        "input_size": (8, 8),
        "num_images": 1,
    }
    with pytest.raises(ValueError, match=message):
        InstanceTargets(**{**fields, **wrong})


def test_total_is_the_sum_of_the_losses():
    output = CriterionOutput({"loss_a": torch.tensor(1.5), "loss_b": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert output.total.item() == 3.5 and output.total.dtype == torch.float32
