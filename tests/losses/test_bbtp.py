import math

import pytest
import references_box_losses as reference
import torch

from sim_hf.losses import smoothness_loss, tightness_loss
from sim_hf.structures import rasterize_boxes

HEIGHT, WIDTH, STRIDE = 6, 7, 4
BOXES = torch.tensor([[4.0, 4.0, 20.0, 20.0], [13.0, 13.0, 14.0, 14.0], [0.0, 0.0, 28.0, 24.0]])  # usual, one cell, all


def shadows():
    return rasterize_boxes(BOXES, HEIGHT, WIDTH, STRIDE)


def test_tightness_of_a_hand_computed_mask():
    # 2 x 2 grid, the box is the left column. p = [[3/4, 1/2], [1/4, 1/2]].
    logits = torch.tensor([[[math.log(3), 0.0], [-math.log(3), 0.0]]])
    rows, columns = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    # Through the box: rows with 3/4 and 1/4 inside the box, the column with 3/4. Missing it: the column with 1/2.
    held = -(math.log(3 / 4) + math.log(1 / 4) + math.log(3 / 4)) / 3
    assert tightness_loss(logits, rows, columns).item() == pytest.approx(held + math.log(2), rel=1e-6)


def test_smoothness_of_a_hand_computed_mask():
    logits = torch.tensor([[[math.log(3), 0.0, 0.0], [-math.log(3), 0.0, -math.log(3)]]])
    rows, columns = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    # Pairs with an end in the left column: down 3/4 to 1/4; right 3/4 to 1/2 and 1/4 to 1/2. Three lines go through the box.
    assert smoothness_loss(logits, rows, columns).item() == pytest.approx((0.25 + 0.0625 + 0.0625) / 3, rel=1e-6)


def test_tightness_is_zero_for_a_cross_that_touches_all_sides():
    """One positive in each line is enough: shape inside the box is not this term's business."""
    rows, columns = rasterize_boxes(torch.tensor([[4.0, 4.0, 20.0, 20.0]]), 6, 6, STRIDE)
    logits = torch.full((1, 6, 6), -40.0)
    logits[0, 3, 1:5] = 40.0
    logits[0, 1:5, 2] = 40.0
    assert tightness_loss(logits, rows, columns).item() < 1e-6
    assert smoothness_loss(logits, rows, columns).item() > 0.1


def test_a_pixel_beside_the_box_does_not_fill_its_row():
    rows, columns = torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]])
    logits = torch.tensor([[[-5.0, 5.0]]])
    lost = math.log(1 + math.exp(5))
    assert tightness_loss(logits, rows, columns).item() == pytest.approx(lost + lost, rel=1e-5)


def test_losses_equal_the_slow_reference():
    logits = 2 * torch.randn(3, HEIGHT, WIDTH)
    rows, columns = shadows()
    for ours, slow in ((tightness_loss, reference.tightness), (smoothness_loss, reference.smoothness)):
        expected = [slow(logits[n].tolist(), rows[n].tolist(), columns[n].tolist()) for n in range(3)]
        assert ours(logits, rows, columns).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [tightness_loss, smoothness_loss])
def test_gradients_are_right(loss):
    rows, columns = shadows()
    logits = torch.randn(3, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, rows, columns), logits)


def test_a_box_in_the_padding_keeps_one_cell():
    rows, columns = rasterize_boxes(torch.tensor([[40.0, 40.0, 41.0, 41.0]]), HEIGHT, WIDTH, STRIDE)
    filled = (rows[:, :, None] * columns[:, None] * 2 - 1) * 40
    assert tightness_loss(filled, rows, columns).item() < 1e-6
    assert smoothness_loss(filled, rows, columns).item() == pytest.approx(2 / 2)  # two neighbours in the corner, two lines


@pytest.mark.parametrize("loss", [tightness_loss, smoothness_loss])
def test_no_instance_gives_an_empty_loss_with_a_gradient_path(loss):
    logits = torch.zeros(0, HEIGHT, WIDTH, requires_grad=True)
    result = loss(logits, *rasterize_boxes(torch.zeros(0, 4), HEIGHT, WIDTH, STRIDE))
    assert result.shape == (0,) and result.dtype == torch.float32
    result.sum().backward()
    assert logits.grad.shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_give_finite_float32_losses_and_gradients(dtype):
    largest = 1e37 if dtype == torch.float32 else torch.finfo(torch.float16).max
    rows, columns = shadows()
    filled = (rows[:, :, None] * columns[:, None] * 2 - 1) * largest
    for values in (torch.full((3, HEIGHT, WIDTH), largest), torch.full((3, HEIGHT, WIDTH), -largest), filled, -filled):
        logits = values.to(dtype).requires_grad_()
        loss = tightness_loss(logits, rows, columns) + smoothness_loss(logits, rows, columns)
        loss.sum().backward()
        assert loss.dtype == torch.float32 and loss.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [tightness_loss, smoothness_loss])
def test_shadows_of_one_box_are_not_broadcast_over_all_masks(loss):
    with pytest.raises(ValueError, match=r"expected box rows \(3, 6\)"):
        loss(torch.zeros(3, HEIGHT, WIDTH), *rasterize_boxes(BOXES[:1], HEIGHT, WIDTH, STRIDE))
