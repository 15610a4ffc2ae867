import math

import pytest
import references_losses as reference
import torch
from transformers.models.mask2former import modeling_mask2former as mask2former

from sim_hf.losses import bce_cost, dice_cost, masked_bce_loss, masked_dice_loss, sample_points, uncertain_points

LOSSES = [(masked_bce_loss, reference.bce), (masked_dice_loss, reference.smooth_dice)]
both_losses = pytest.mark.parametrize(("loss", "slow"), LOSSES, ids=["bce", "dice"])


# --- BCE and Dice on trusted pixels


def test_bce_of_a_hand_computed_mask():
    logits = torch.tensor([[[0.0, math.log(3)]]])
    target = torch.tensor([[[True, False]]])  # -log 1/2 and -log 1/4
    assert masked_bce_loss(logits, target).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert masked_bce_loss(logits, target, torch.tensor([[[True, False]]])).item() == pytest.approx(math.log(2))


def test_dice_of_a_hand_computed_mask():
    logits = torch.tensor([[[0.0, math.log(3)]]])
    target = torch.tensor([[[True, False]]])  # 1 - (2 * 1/2 + 1) / (5/4 + 1 + 1)
    assert masked_dice_loss(logits, target).item() == pytest.approx(1 - 2 / 3.25)
    assert masked_dice_loss(logits, target, torch.tensor([[[True, False]]])).item() == pytest.approx(1 - 2 / 2.5)


@both_losses
@pytest.mark.parametrize("kind", ["bool", "soft"])
@pytest.mark.parametrize("trust", ["all", "some", "weights"])
def test_losses_equal_the_slow_reference(loss, slow, kind, trust):
    logits = torch.randn(3, 4, 5) * 3
    target = torch.rand(3, 4, 5) if kind == "soft" else torch.rand(3, 4, 5) > 0.5
    trusted = {"all": None, "some": torch.rand(3, 4, 5) > 0.3, "weights": torch.rand(3, 4, 5)}[trust]

    def flat(tensor, n):
        return None if tensor is None else tensor[n].flatten().tolist()

    expected = [slow(flat(logits, n), flat(target, n), flat(trusted, n)) for n in range(3)]
    torch.testing.assert_close(loss(logits, target, trusted), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@both_losses
def test_gradient_is_right(loss, slow):
    target, trusted = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4) > 0.3
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, trusted), logits)


@both_losses
def test_untrusted_pixels_have_neither_value_nor_gradient(loss, slow):
    trusted = torch.zeros(1, 4, 4, dtype=torch.bool)
    trusted[:, :2] = True
    logits, target = torch.randn(1, 4, 4), torch.rand(1, 4, 4) > 0.5
    other = torch.where(trusted, logits, 1000.0).requires_grad_()
    value = loss(other, target, trusted)
    value.sum().backward()
    assert torch.equal(value, loss(logits, target, trusted))
    assert (other.grad[~trusted] == 0).all() and (other.grad[trusted] != 0).all()


@both_losses
def test_instance_without_a_trusted_pixel_gives_zero_with_a_gradient_path(loss, slow):
    logits = torch.randn(2, 4, 4, requires_grad=True)
    trusted = torch.ones(2, 4, 4, dtype=torch.bool)
    trusted[0] = False
    loss_N = loss(logits, torch.ones(2, 4, 4), trusted)
    loss_N.sum().backward()
    assert loss_N[0] == 0 and loss_N[1] > 0
    assert (logits.grad[0] == 0).all()


@both_losses
def test_no_instance_gives_an_empty_loss_with_a_gradient_path(loss, slow):
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    loss_N = loss(logits, torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, 4, 4, dtype=torch.bool))
    assert loss_N.shape == (0,)
    loss_N.sum().backward()
    assert logits.grad.shape == (0, 4, 4)


@both_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_give_finite_float32_losses_and_gradients(loss, slow, dtype):
    largest = 1e4 if dtype == torch.float32 else torch.finfo(dtype).max
    target = torch.rand(2, 16, 16) > 0.5
    for signs in (target.float() * 2 - 1, 1 - target.float() * 2, torch.ones(2, 16, 16), -torch.ones(2, 16, 16)):
        for trusted in (None, torch.rand(2, 16, 16) > 0.5):
            logits = (signs * largest).to(dtype).requires_grad_()
            loss_N = loss(logits, target, trusted)
            loss_N.sum().backward()
            assert loss_N.dtype == torch.float32 and loss_N.isfinite().all() and logits.grad.isfinite().all()


@both_losses
def test_target_of_one_instance_is_not_broadcast_over_all_masks(loss, slow):
    with pytest.raises(ValueError, match=r"shape of the logits \(3, 4, 4\), got \[\(1, 4, 4\)\]"):
        loss(torch.zeros(3, 4, 4), torch.zeros(1, 4, 4))


def test_empty_target_pushes_the_mask_down():
    logits = torch.zeros(1, 4, 4, requires_grad=True)
    masked_dice_loss(logits, torch.zeros(1, 4, 4, dtype=torch.bool)).sum().backward()
    assert (logits.grad > 0).all()


def test_losses_on_points_equal_those_of_transformers():
    logits, target = torch.randn(5, 40) * 3, (torch.rand(5, 40) > 0.5).float()
    theirs = mask2former.sigmoid_cross_entropy_loss(logits, target, num_masks=5)
    torch.testing.assert_close(masked_bce_loss(logits, target).mean(), theirs)
    torch.testing.assert_close(masked_dice_loss(logits, target).mean(), mask2former.dice_loss(logits, target, 5))


# --- matching costs


def test_costs_are_the_losses_of_all_pairs():
    logits_QP, targets_GP = torch.randn(6, 30) * 3, torch.rand(4, 30) > 0.5
    for cost, loss in ((bce_cost, masked_bce_loss), (dice_cost, masked_dice_loss)):
        expected = torch.stack([loss(logits_QP, target.expand(6, 30)) for target in targets_GP], 1)
        torch.testing.assert_close(cost(logits_QP, targets_GP), expected, rtol=1e-5, atol=1e-6)


def test_costs_equal_those_of_transformers():
    logits_QP, targets_GP = torch.randn(6, 30) * 3, (torch.rand(4, 30) > 0.5).float()
    theirs = mask2former.pair_wise_sigmoid_cross_entropy_loss(logits_QP, targets_GP)
    torch.testing.assert_close(bce_cost(logits_QP, targets_GP), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dice_cost(logits_QP, targets_GP), mask2former.pair_wise_dice_loss(logits_QP, targets_GP), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cost", [bce_cost, dice_cost])
def test_costs_stay_float32_under_autocast_and_finite_for_huge_logits(cost):
    logits, targets = torch.randn(6, 300), torch.rand(4, 300) > 0.5
    outside = cost(logits, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cost(logits, targets), outside)
    for dtype in (torch.float16, torch.bfloat16):
        assert cost((logits.sign() * torch.finfo(dtype).max).to(dtype), targets).isfinite().all()


@pytest.mark.parametrize("cost", [bce_cost, dice_cost])
def test_cost_without_instances_is_empty(cost):
    assert cost(torch.zeros(6, 30), torch.zeros(0, 30)).shape == (6, 0)
    with pytest.raises(ValueError, match=r"got \(6, 30\) and \(4, 20\)"):
        cost(torch.zeros(6, 30), torch.zeros(4, 20))


# --- points


def test_point_at_a_pixel_centre_is_the_pixel_and_between_two_is_their_mean():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.25], [0.25, 0.5], [0.5, 0.5]]])  # (x, y)
    assert sample_points(maps, points).tolist() == [[1.0, 2.0, 1.5, 2.0, 2.5]]


def test_point_in_the_corner_mixes_in_the_zeros_outside():
    assert sample_points(torch.full((1, 2, 2), 4.0), torch.zeros(1, 1, 2)).item() == 1.0


def test_points_sample_bool_maps_half_maps_and_gradients():
    points = torch.rand(3, 7, 2)
    maps = torch.rand(3, 5, 6) > 0.5
    assert torch.equal(sample_points(maps, points), sample_points(maps.half(), points))
    theirs = mask2former.sample_point(maps[:, None].float(), points, align_corners=False).squeeze(1)
    assert torch.equal(sample_points(maps, points), theirs)
    logits = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sample_points(x, points), logits)


def test_three_quarters_of_the_uncertain_points_lie_at_the_border_of_the_mask():
    ramp = torch.linspace(-10, 10, 64).expand(2, 64, 64)  # undecided at x = 0.5
    points = uncertain_points(ramp, 400)
    near = (points[..., 0] - 0.5).abs() < 0.25 + 0.05  # 300 of 1200: the inner quarter; random ones fall in too
    assert points.shape == (2, 400, 2) and (points >= 0).all() and (points < 1).all()
    assert (near[:, :300].all(1)).all() and not near[:, 300:].all()


def test_uncertain_points_without_importance_are_uniform_and_repeat_with_the_generator():
    logits = torch.randn(3, 8, 8)
    first = uncertain_points(logits, 50, importance_ratio=0.0, generator=torch.Generator().manual_seed(1))
    again = uncertain_points(logits, 50, importance_ratio=0.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again) and first.mean().item() == pytest.approx(0.5, abs=0.1)


def test_points_of_no_instance_are_empty():
    assert uncertain_points(torch.zeros(0, 8, 8), 50).shape == (0, 50, 2)
    assert sample_points(torch.zeros(0, 8, 8), torch.zeros(0, 50, 2)).shape == (0, 50)


def test_wrong_points_and_ratios_are_refused():
    with pytest.raises(ValueError, match=r"points must be \(3, P, 2\), got \(1, 7, 2\)"):
        sample_points(torch.zeros(3, 4, 4), torch.zeros(1, 7, 2))
    with pytest.raises(ValueError, match="oversample_ratio >= 1"):
        uncertain_points(torch.zeros(1, 4, 4), 7, oversample_ratio=0.5)
    with pytest.raises(ValueError, match=r"importance_ratio in 0\.\.1"):
        uncertain_points(torch.zeros(1, 4, 4), 7, importance_ratio=1.5)
