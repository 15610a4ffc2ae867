import pytest
import references_losses as reference
import torch

from sim_hf.losses import box_projections, projection_cost, projection_loss

STRIDE = 4


def _boxes():
    return torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 4.0, 32.0, 20.0], [13.0, 13.0, 14.0, 14.0], [0.0, 0.0, 32.0, 24.0]])


def _filled(boxes_G4, height, width, logit):
    rows_GH, columns_GW = box_projections(boxes_G4, height, width, STRIDE)
    return (rows_GH[:, :, None] * columns_GW[:, None, :] * 2 - 1) * logit


def test_box_projections_of_a_box_on_the_grid_lines():
    rows_GH, columns_GW = box_projections(torch.tensor([[4.0, 8.0, 12.0, 12.0]]), 4, 5, STRIDE)
    assert rows_GH.tolist() == [[0, 0, 1, 0]]
    assert columns_GW.tolist() == [[0, 1, 1, 0, 0]]
    assert rows_GH.dtype == torch.float32


def test_box_projections_are_the_shares_of_the_cells_that_the_box_covers():
    boxes = torch.tensor([[3.0, 5.0, 13.0, 16.0]])
    rows_GH, columns_GW = box_projections(boxes, 5, 4, STRIDE)
    assert rows_GH.tolist() == [[0, 0.75, 1, 1, 0]]
    assert columns_GW.tolist() == [[0.25, 1, 1, 0.25]]
    whole = box_projections(boxes, 5, 4, STRIDE, whole_cells=True)
    assert [shadow.tolist() for shadow in whole] == [[[0, 1, 1, 1, 0]], [[0, 1, 1, 0]]]
    # What the shares add up to is the side of the box, wherever it lies on the grid.
    torch.testing.assert_close(rows_GH.sum(1) * STRIDE, boxes[:, 3] - boxes[:, 1])
    torch.testing.assert_close(columns_GW.sum(1) * STRIDE, boxes[:, 2] - boxes[:, 0])


def test_box_projections_of_a_mirrored_box_are_mirrored():
    boxes = torch.tensor([[3.0, 5.0, 13.0, 16.5]])
    rows, columns = box_projections(boxes, 5, 6, STRIDE)
    mirrored_rows, mirrored_columns = box_projections(torch.tensor([[24 - 13.0, 5.0, 24 - 3.0, 16.5]]), 5, 6, STRIDE)
    assert torch.equal(mirrored_columns, columns.flip(1)) and torch.equal(mirrored_rows, rows)


@pytest.mark.parametrize("box", [[13.0, 13.0, 14.0, 14.0], [6.0, 6.0, 10.0, 10.0], [2.0, 3.0, 9.9, 10.9]])
def test_a_box_of_less_than_two_cells_keeps_a_whole_one(box):
    for shadow in box_projections(torch.tensor([box]), 6, 6, STRIDE):
        assert set(shadow.flatten().tolist()) == {0.0, 1.0}


def test_projection_loss_is_zero_where_the_mask_is_undecided_at_the_edges():
    shadows = box_projections(torch.tensor([[3.0, 5.0, 13.0, 16.0]]), 5, 4, STRIDE)
    probabilities = shadows[0][:, :, None] * shadows[1][:, None, :]
    assert projection_loss(probabilities.clamp(1e-6, 1 - 1e-6).logit(), *shadows).item() < 1e-4


def test_projection_loss_is_zero_when_mask_fills_its_box():
    logits_GHW = _filled(_boxes(), 6, 8, 40.0)
    assert projection_loss(logits_GHW, *box_projections(_boxes(), 6, 8, STRIDE)).abs().max() < 1e-4


def test_projection_loss_is_zero_for_a_cross_that_touches_all_sides():
    """The shadows cannot tell a cross from the full box: shape inside the box is the pairwise term's business."""
    rows_GH, columns_GW = box_projections(torch.tensor([[4.0, 4.0, 20.0, 20.0]]), 6, 6, STRIDE)
    logits = torch.full((1, 6, 6), -40.0)
    logits[0, 3, 1:5] = 40.0
    logits[0, 1:5, 2] = 40.0
    assert projection_loss(logits, rows_GH, columns_GW).item() < 1e-4


def test_projection_loss_of_a_hand_computed_mask():
    # p = 0.5 everywhere, 2 x 2 grid, the box is the left column: rows 1, 1 and columns 1, 0.
    rows_NH, columns_NW = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    # rows: 1 - 2 * 1 / (0.5 + 2) = 0.2; columns: 1 - 2 * 0.5 / (0.5 + 1) = 1/3
    assert projection_loss(torch.zeros(1, 2, 2), rows_NH, columns_NW).item() == pytest.approx(0.2 + 1 / 3, abs=1e-5)


def test_projection_loss_is_two_when_mask_and_box_are_apart():
    rows_NH, columns_NW = box_projections(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), 6, 6, STRIDE)
    logits = torch.full((1, 6, 6), -40.0)
    logits[0, 4:, 4:] = 40.0
    assert projection_loss(logits, rows_NH, columns_NW).item() == pytest.approx(2.0, abs=1e-5)


def test_projection_loss_and_cost_equal_the_slow_reference():
    logits_QHW = torch.randn(5, 6, 8) * 3
    rows_GH, columns_GW = box_projections(_boxes(), 6, 8, STRIDE)
    expected_QG = torch.tensor(
        [
            [reference.projection_loss(logits, rows, columns) for rows, columns in zip(rows_GH, columns_GW, strict=True)]
            for logits in logits_QHW
        ]
    )
    torch.testing.assert_close(projection_cost(logits_QHW, rows_GH, columns_GW), expected_QG, atol=2e-6, rtol=0)
    losses_N = projection_loss(logits_QHW[:4], rows_GH, columns_GW)
    torch.testing.assert_close(losses_N, expected_QG[:4].diagonal(), atol=2e-6, rtol=0)


def test_projection_loss_gradient_is_right():
    rows_NH, columns_NW = box_projections(_boxes()[:2], 6, 8, STRIDE)
    logits = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: projection_loss(x, rows_NH.double(), columns_NW.double()), logits)


def test_equal_maxima_share_the_gradient():
    logits = torch.zeros(1, 3, 3, requires_grad=True)
    projection_loss(logits, torch.ones(1, 3), torch.ones(1, 3)).sum().backward()
    assert logits.grad.unique().numel() == 1 and logits.grad.max() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1000, 4, 1])
def test_gradient_equals_that_of_amax_with_and_without_ties(dtype, levels):
    rows_NH, columns_NW = box_projections(_boxes(), 6, 8, STRIDE)
    logits = (torch.randint(levels, (4, 6, 8)) / 100 - 1).to(dtype)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss_N = projection_loss(ours, rows_NH, columns_NW)
    expected_N = torch.zeros(4)
    for axis, box_NL in ((2, rows_NH), (1, columns_NW)):
        mask_NL = plain.amax(axis).float().sigmoid()
        sizes_N = mask_NL.square().sum(1) + box_NL.square().sum(1)
        expected_N = expected_N + 1 - 2 * (mask_NL * box_NL).sum(1) / (sizes_N + 1e-5)
    torch.testing.assert_close(loss_N, expected_N)
    weights_N = torch.arange(1.0, 5.0)
    (loss_N * weights_N).sum().backward()
    (expected_N * weights_N).sum().backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, plain.grad)
    assert torch.equal(ours.grad != 0, plain.grad != 0)


def test_bfloat16_mask_shares_the_gradient_of_a_long_flat_line():
    rows_NH, gradients = torch.ones(1, 2), []
    for dtype in (torch.bfloat16, torch.float32):
        logits_NHW = torch.zeros(1, 2, 1024, dtype=dtype, requires_grad=True)
        projection_loss(logits_NHW, rows_NH, torch.zeros(1, 1024)).sum().backward()
        gradients.append(logits_NHW.grad)
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("box", [[13.0, 13.0, 14.0, 14.0], [31.5, 23.5, 32.0, 24.0], [40.0, 40.0, 41.0, 41.0]])
def test_one_pixel_box_keeps_one_cell_and_a_finite_loss(box):
    rows_NH, columns_NW = box_projections(torch.tensor([box]), 6, 8, STRIDE)
    assert rows_NH.sum() == 1 and columns_NW.sum() == 1
    filled = (rows_NH[:, :, None] * columns_NW[:, None, :] * 2 - 1) * 40
    assert projection_loss(filled, rows_NH, columns_NW).item() < 1e-4


def test_no_instance_gives_an_empty_loss_with_a_gradient_path():
    logits = torch.zeros(0, 6, 8, requires_grad=True)
    loss_N = projection_loss(logits, *box_projections(torch.zeros(0, 4), 6, 8, STRIDE))
    assert loss_N.shape == (0,) and loss_N.dtype == torch.float32
    loss_N.sum().backward()
    assert logits.grad.shape == (0, 6, 8)
    assert projection_cost(torch.zeros(3, 6, 8), *box_projections(torch.zeros(0, 4), 6, 8, STRIDE)).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_give_finite_float32_losses_and_gradients(dtype):
    largest = 1e4 if dtype == torch.float32 else torch.finfo(dtype).max
    rows_NH, columns_NW = box_projections(_boxes(), 6, 8, STRIDE)
    for logits in (torch.full((4, 6, 8), largest), torch.full((4, 6, 8), -largest), _filled(_boxes(), 6, 8, largest)):
        logits = logits.to(dtype).requires_grad_()
        loss_N = projection_loss(logits, rows_NH, columns_NW)
        loss_N.sum().backward()
        assert loss_N.dtype == torch.float32 and loss_N.isfinite().all() and logits.grad.isfinite().all()
        assert projection_cost(logits, rows_NH, columns_NW).isfinite().all()


def test_autocast_changes_nothing():
    logits = torch.randn(3, 6, 8)
    shadows = box_projections(_boxes()[:3], 6, 8, STRIDE)
    outside = projection_loss(logits, *shadows), projection_cost(logits, *shadows)
    with torch.autocast("cpu", torch.bfloat16):
        inside = projection_loss(logits, *shadows), projection_cost(logits, *shadows)
    assert torch.equal(inside[0], outside[0]) and torch.equal(inside[1], outside[1])


def test_shadows_of_one_box_are_not_broadcast_over_all_masks():
    with pytest.raises(ValueError, match=r"expected box rows \(3, 6\)"):
        projection_loss(torch.zeros(3, 6, 8), *box_projections(_boxes()[:1], 6, 8, STRIDE))
