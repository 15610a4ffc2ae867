"""BBTP: rows and columns as bags, and a little smoothness."""

import pytest
import torch
from synthetic_outputs import (
    GRID,
    STRIDE,
    ellipses,
    gradients,
    leaves_of,
    make_images,
    make_output,
    make_set_criterion,
    make_targets,
    price,
)

from sim_hf.criteria.bbtp import BBTPCriterion
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.losses import smoothness_loss, tightness_loss
from sim_hf.structures import MaskPredictions, box_masks, rasterize_boxes

KEYS = ["loss_cross_entropy", "loss_tightness", "loss_smoothness", "loss_mask", "loss_dice"]


def student_of(mask_logits, instance_ids):
    return MaskPredictions(mask_logits, torch.tensor(instance_ids), torch.ones(len(instance_ids)), torch.zeros(2, 1, *GRID))


def call(criterion, students, targets, *, num_instances=3.0):
    return criterion(students, None, targets, *make_images(targets.num_images), num_instances=num_instances, global_step=0).losses


def test_losses_are_weighted_sums_over_layers_and_instances():
    targets = make_targets()
    layers, ids = [torch.randn(3, *GRID), torch.randn(2, *GRID)], [[0, 1, 2], [2, 0]]
    students = [student_of(*pair) for pair in zip(layers, ids, strict=True)]
    losses = call(BBTPCriterion(tightness_weight=5.0, smoothness_weight=0.25), students, targets, num_instances=7.0)
    sums = [0.0, 0.0]
    for logits, instances in zip(layers, ids, strict=True):
        shadows = rasterize_boxes(targets.boxes_G4[instances], *GRID, STRIDE)
        sums[0] += tightness_loss(logits, *shadows).sum().item()
        sums[1] += smoothness_loss(logits, *shadows).sum().item()
    assert losses["loss_tightness"].item() == pytest.approx(5.0 * sums[0] / 7, rel=1e-5)
    assert losses["loss_smoothness"].item() == pytest.approx(0.25 * sums[1] / 7, rel=1e-5)


def test_a_mask_that_fills_its_box_has_no_tightness_loss():
    targets = make_targets()
    filled = 80.0 * box_masks(targets.boxes_G4, *GRID, STRIDE).float() - 40.0
    losses = call(BBTPCriterion(), [student_of(filled, [0, 1, 2])], targets)
    assert losses["loss_tightness"].item() == pytest.approx(0, abs=1e-4)


def test_matching_and_real_masks_are_those_of_boxinst():
    targets = make_targets(has_mask=[False, True, False])
    targets.masks_GHW = ellipses(targets)
    logits = torch.randn(3, *GRID)
    ours, theirs = (
        call(criterion, [student_of(logits, [0, 1, 2])], targets) for criterion in (BBTPCriterion(), BoxInstCriterion())
    )
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(ours[name], theirs[name])
    costs = [criterion.matching_cost(logits, targets, global_step=0) for criterion in (BBTPCriterion(), BoxInstCriterion())]
    assert torch.equal(*costs)


def test_an_instance_with_a_real_mask_prices_bce_and_dice_and_no_box_term():
    targets = make_targets(has_mask=[False, True, False])
    targets.masks_GHW = ellipses(targets)
    logits = torch.randn(3, *GRID, requires_grad=True)
    losses = call(BBTPCriterion(), [student_of(logits, [0, 1, 2])], targets)
    (box_gradient,) = torch.autograd.grad(losses["loss_tightness"] + losses["loss_smoothness"], logits, retain_graph=True)
    (mask_gradient,) = torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], logits)
    assert [bool(row.any()) for row in box_gradient] == [True, False, True]
    assert [bool(row.any()) for row in mask_gradient] == [False, True, False]


@pytest.mark.parametrize("num_instances", [0, 3])
def test_names_of_the_losses_do_not_depend_on_the_batch(num_instances):
    targets = make_targets() if num_instances else make_targets([], num_images=2)
    assert list(price(make_set_criterion(BBTPCriterion()), make_output(), targets).losses) == KEYS


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_give_finite_losses_and_gradients(scale):
    output = make_output(scale=1.0)
    with torch.no_grad():
        for logits in leaves_of(output)[1::2]:
            logits.copy_(logits.sign() * scale)
    result = price(make_set_criterion(BBTPCriterion()), output, make_targets())
    assert all(loss.isfinite() for loss in result.losses.values()), result.losses
    assert all(gradient.isfinite().all() for gradient in gradients(output, result.total))


def test_a_batch_of_huge_logits_without_instances_prices_exactly_nothing():
    output = make_output(scale=1.0)
    with torch.no_grad():
        for logits in leaves_of(output)[1::2]:
            logits.fill_(3e38)
    losses = price(make_set_criterion(BBTPCriterion()), output, make_targets([], num_images=2)).losses
    assert [losses[name].item() for name in KEYS[1:]] == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("boxes", [[[12, 12, 13, 13]], [[38, 30, 40, 32]], [[0, 0, 40, 32]]])
def test_half_precision_and_odd_boxes_give_finite_float32_losses_and_gradients(dtype, boxes):
    output = make_output(dtype=dtype)
    result = price(make_set_criterion(BBTPCriterion()), output, make_targets(boxes, [0], [0], num_images=2))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in result.losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(output, result.total))
