"""BoxInst: projection + pairwise, and real masks where there are some."""

import math

import pytest
import torch
from synthetic_outputs import (
    GRID,
    INPUT,
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

from sim_hf.criteria import base
from sim_hf.criteria.base import linear_warmup
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.losses import box_projections
from sim_hf.structures import MaskPredictions, box_masks

KEYS = ["loss_cross_entropy", "loss_projection", "loss_pairwise", "loss_mask", "loss_dice"]


def student_of(mask_logits, instance_ids):
    return MaskPredictions(mask_logits, torch.tensor(instance_ids), torch.ones(len(instance_ids)), torch.zeros(2, 1, *GRID))


def call(criterion, students, targets, *, step=20_000, num_instances=3.0, images=None):
    images, pixel_mask = images or make_images(targets.num_images)
    return criterion(students, None, targets, images, pixel_mask, num_instances=num_instances, global_step=step).losses


def dice_of_shadows(probabilities, target):
    overlap = sum(p * t for p, t in zip(probabilities, target, strict=True))
    return 1 - 2 * overlap / (sum(p * p for p in probabilities) + sum(t * t for t in target) + 1e-5)


def slow_projection(mask_logits_HW, box):
    probabilities = mask_logits_HW.sigmoid()
    inside = box_masks(torch.tensor([box]).float(), *GRID, STRIDE)[0]
    rows = dice_of_shadows(probabilities.amax(1).tolist(), inside.any(1).double().tolist())
    return rows + dice_of_shadows(probabilities.amax(0).tolist(), inside.any(0).double().tolist())


def slow_pairwise(mask_logits_HW, box):
    """An image of one colour: all pairs on the grid with an anchor in the box count."""
    probabilities = mask_logits_HW.sigmoid().tolist()
    inside = box_masks(torch.tensor([box]).float(), *GRID, STRIDE)[0]
    losses = []
    for row, column in inside.nonzero().tolist():
        for down in (-2, 0, 2):
            for right in (-2, 0, 2):
                r, c = row + down, column + right
                if (down, right) == (0, 0) or not (0 <= r < GRID[0] and 0 <= c < GRID[1]):
                    continue
                p, q = probabilities[row][column], probabilities[r][c]
                losses.append(-math.log(p * q + (1 - p) * (1 - q)))
    return sum(losses) / len(losses)


def test_losses_equal_slow_loops_over_layers_and_instances():
    targets = make_targets()
    layers = [torch.randn(3, *GRID), torch.randn(2, *GRID)]
    ids = [[0, 1, 2], [2, 0]]  # the second layer found no query for instance 1
    images = (torch.full((2, 3, *INPUT), 0.4), torch.ones(2, *INPUT))
    losses = call(
        BoxInstCriterion(projection_weight=5.0, pairwise_weight=2.0),
        [student_of(*pair) for pair in zip(layers, ids, strict=True)],
        targets,
        num_instances=7.0,
        images=images,
    )
    boxes = targets.boxes_G4.tolist()
    rows = [(logits, boxes[g]) for of_layer, gs in zip(layers, ids, strict=True) for logits, g in zip(of_layer, gs, strict=True)]
    assert losses["loss_projection"].item() == pytest.approx(5 * sum(slow_projection(*row) for row in rows) / 7, rel=1e-5)
    assert losses["loss_pairwise"].item() == pytest.approx(2 * sum(slow_pairwise(*row) for row in rows) / 7, rel=1e-5)


def test_a_mask_that_fills_its_box_has_no_projection_loss():
    targets = make_targets()
    filled = 80.0 * box_masks(targets.boxes_G4, *GRID, STRIDE).float() - 40.0
    assert call(BoxInstCriterion(), [student_of(filled, [0, 1, 2])], targets)["loss_projection"].item() == pytest.approx(
        0, abs=1e-4
    )


def test_a_box_that_ends_within_cells_asks_for_their_shares_or_for_whole_cells():
    targets = make_targets([[3, 5, 29, 22]], [0], [0], num_images=1)
    rows_GH, columns_GW = box_projections(targets.boxes_G4, *GRID, STRIDE)
    shares = (rows_GH[:, :, None] * columns_GW[:, None, :]).clamp(1e-6, 1 - 1e-6).logit()
    whole = 80.0 * box_masks(targets.boxes_G4, *GRID, STRIDE).float() - 40.0
    for exact, mask, other in ((True, shares, whole), (False, whole, shares)):
        criterion = BoxInstCriterion(exact_box_edges=exact)
        loss, more = (
            call(criterion, [student_of(m, [0])], targets, num_instances=1.0)["loss_projection"].item() for m in (mask, other)
        )
        assert loss == pytest.approx(0, abs=1e-3) and more > 0.1
        cost, higher = (criterion.matching_cost(m, targets, global_step=0).item() for m in (mask, other))
        assert cost == pytest.approx(0, abs=1e-4) and higher > 0.01


def test_warmup_goes_from_zero_to_one_in_a_line():
    assert [linear_warmup(step, 10) for step in (0, 1, 5, 10, 11)] == [0, 0.1, 0.5, 1, 1]
    assert linear_warmup(0, 0) == 1


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (250, 0.25), (1000, 1.0), (5000, 1.0)])
def test_pairwise_loss_warms_up_and_projection_does_not(step, share):
    students, targets = [student_of(torch.randn(3, *GRID), [0, 1, 2])], make_targets()
    criterion = BoxInstCriterion(pairwise_warmup_steps=1000)
    losses, full = call(criterion, students, targets, step=step), call(criterion, students, targets, step=10**6)
    assert losses["loss_pairwise"].item() == pytest.approx(share * full["loss_pairwise"].item())
    assert torch.equal(losses["loss_projection"], full["loss_projection"])


def test_an_instance_with_a_real_mask_prices_bce_and_dice_and_no_box_term():
    targets = make_targets(has_mask=[False, True, False])
    targets.masks_GHW = ellipses(targets)
    logits = torch.randn(3, *GRID, requires_grad=True)
    losses = call(BoxInstCriterion(), [student_of(logits, [0, 1, 2])], targets)
    (box_gradient,) = torch.autograd.grad(losses["loss_projection"] + losses["loss_pairwise"], logits, retain_graph=True)
    (mask_gradient,) = torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], logits)
    assert [bool(row.any()) for row in box_gradient] == [True, False, True]
    assert [bool(row.any()) for row in mask_gradient] == [False, True, False]


def test_real_masks_are_priced_by_their_share_of_each_cell():
    targets = make_targets([[0, 0, 8, 8]], [0], [0], num_images=1, has_mask=[True])
    targets.masks_GHW = torch.zeros(1, *INPUT, dtype=torch.bool)
    targets.masks_GHW[0, :4, :2] = True  # half of the first cell
    logits = torch.zeros(1, *GRID)
    losses = call(BoxInstCriterion(mask_weight=5.0, dice_weight=5.0), [student_of(logits, [0])], targets, num_instances=2.0)
    num_cells = GRID[0] * GRID[1]
    assert losses["loss_mask"].item() == pytest.approx(5 * math.log(2) / 2)
    assert losses["loss_dice"].item() == pytest.approx(5 * (1 - (2 * 0.25 + 1) / (0.5 * num_cells + 0.5 + 1)) / 2)


@pytest.mark.parametrize("masks", ["none", "some", "none real"])
@pytest.mark.parametrize("num_instances", [0, 3])
def test_names_of_the_losses_do_not_depend_on_the_batch(masks, num_instances):
    targets = make_targets() if num_instances else make_targets([], num_images=2)
    if masks != "none":
        targets.masks_GHW = ellipses(targets)
        targets.has_mask_G = torch.tensor([masks == "some", False, False][:num_instances], dtype=torch.bool)
    result = price(make_set_criterion(BoxInstCriterion()), make_output(), targets)
    assert list(result.losses) == KEYS


def test_an_instance_with_a_mask_beside_a_batch_without_masks_changes_no_other_gradient():
    """The criterion is a sum over instances: what one is priced by does not reach another."""
    targets, output = make_targets(), make_output(num_layers=1)
    criterion = make_set_criterion(BoxInstCriterion())
    plain = gradients(output, price(criterion, output, targets).total)[-1]
    targets.masks_GHW, targets.has_mask_G = ellipses(targets), torch.tensor([False, False, True])
    mixed = gradients(output, price(criterion, output, targets).total)[-1]
    assert torch.equal(plain[0], mixed[0]) and not torch.equal(plain[1], mixed[1])


def test_matching_cost_is_zero_for_the_filled_box_and_larger_for_any_other():
    targets = make_targets()
    filled = 80.0 * box_masks(targets.boxes_G4, *GRID, STRIDE).float() - 40.0
    cost_QG = BoxInstCriterion().matching_cost(filled, targets, global_step=0)
    assert cost_QG.diagonal().tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert ((cost_QG > 0.05) | torch.eye(3, dtype=torch.bool)).all() and cost_QG.max() <= 1


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_give_finite_losses_and_gradients(scale):
    targets = make_targets(has_mask=[False, True, False])
    targets.masks_GHW = ellipses(targets)
    output = make_output(scale=1.0)
    with torch.no_grad():
        for logits in leaves_of(output)[1::2]:
            logits.copy_(logits.sign() * scale)
    result = price(make_set_criterion(BoxInstCriterion()), output, targets)
    assert all(loss.isfinite() for loss in result.losses.values()), result.losses
    assert all(gradient.isfinite().all() for gradient in gradients(output, result.total))


def test_a_batch_of_huge_logits_without_instances_prices_exactly_nothing():
    output = make_output(scale=1.0)
    with torch.no_grad():
        for logits in leaves_of(output)[1::2]:
            logits.fill_(3e38)  # a sum over two of them is infinite, and 0 times that is not a number
    losses = price(make_set_criterion(BoxInstCriterion()), output, make_targets([], num_images=2)).losses
    assert [losses[name].item() for name in KEYS[1:]] == [0, 0, 0, 0]


@pytest.mark.parametrize("layers_of_a_call", [1, 3, 4])
@pytest.mark.parametrize("with_masks", [False, True])
def test_all_layers_in_few_calls_equal_a_call_for_each_layer(with_masks, layers_of_a_call, monkeypatch):
    monkeypatch.setattr(base, "_CELLS_OF_A_CALL", layers_of_a_call * 3 * GRID[0] * GRID[1])
    targets = make_targets()
    if with_masks:
        targets.masks_GHW = torch.rand(3, *INPUT) > 0.5
        targets.has_mask_G = torch.tensor([True, False, True])
    layers = [3 * torch.randn(3, *GRID) for _ in range(4)]
    ids = [[0, 1, 2], [2, 0, 1], [1, 1, 1], [0, 2, 2]]
    results = []
    for groups in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        logits = [layer.clone().requires_grad_() for layer in layers]
        losses = [call(BoxInstCriterion(), [student_of(logits[i], ids[i]) for i in group], targets) for group in groups]
        sums = {name: torch.stack([of_group[name] for of_group in losses]).sum() for name in losses[0]}
        results.append((sums, torch.autograd.grad(torch.stack(list(sums.values())).sum(), logits)))
    (together, gradients_together), (apart, gradients_apart) = results
    for name, loss in together.items():
        torch.testing.assert_close(loss, apart[name])
    for mine, theirs in zip(gradients_together, gradients_apart, strict=True):
        torch.testing.assert_close(mine, theirs)
