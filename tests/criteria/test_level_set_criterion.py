"""Box2Mask without its tree filter: its terms, summed over layers and instances as those of the neighbours are."""

import pytest
import torch
from synthetic_outputs import (
    CHANNELS,
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

from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.level_set import COLOR_SPREAD, LevelSetCriterion, colors_on_grid
from sim_hf.losses import color_affinity, local_consistency_loss, region_energy, unit_features
from sim_hf.structures import MaskPredictions, box_masks

KEYS = ["loss_cross_entropy", "loss_projection", "loss_level_set", "loss_local_consistency", "loss_mask", "loss_dice"]
FEATURES = torch.randn(2, CHANNELS, *GRID, generator=torch.Generator().manual_seed(1))


def student_of(mask_logits, instance_ids, num_images=2):
    return MaskPredictions(mask_logits, torch.tensor(instance_ids), torch.ones(len(instance_ids)), FEATURES[:num_images])


def call(criterion, students, targets, *, num_instances=3.0, images=None):
    images, pixel_mask = images or make_images(targets.num_images)
    return criterion(students, None, targets, images, pixel_mask, num_instances=num_instances, global_step=0).losses


def test_losses_are_weighted_sums_over_layers_and_instances():
    targets, (images, _) = make_targets(), make_images()
    layers, ids = [torch.randn(3, *GRID), torch.randn(2, *GRID)], [[0, 1, 2], [2, 0]]
    students = [student_of(*pair) for pair in zip(layers, ids, strict=True)]
    losses = call(LevelSetCriterion(), students, targets, num_instances=7.0)
    colors = torch.nn.functional.avg_pool2d(images, STRIDE)
    affinity = color_affinity(colors, torch.ones(2, *GRID), dilation=2, alpha=0.3)
    energy = consistency = 0.0
    for logits, instances in zip(layers, ids, strict=True):
        inside = box_masks(targets.boxes_G4[instances], *GRID, STRIDE)
        image_ids = targets.image_ids_G[instances]
        # Mean over the three channels of colours in units of their spread.
        energy += 0.05 * region_energy(logits, inside, colors / COLOR_SPREAD, image_ids).sum() / 3
        energy += 5.0 * region_energy(logits, inside, unit_features(FEATURES), image_ids).sum()
        consistency += 0.2 * local_consistency_loss(logits, inside, affinity, image_ids).sum()
    assert losses["loss_level_set"].item() == pytest.approx(energy.item() / 7, rel=1e-5)
    assert losses["loss_local_consistency"].item() == pytest.approx(consistency.item() / 7, rel=1e-5)


def test_projection_matching_and_real_masks_are_those_of_boxinst():
    targets = make_targets(has_mask=[False, True, False])
    targets.masks_GHW = ellipses(targets)
    logits = torch.randn(3, *GRID)
    ours, theirs = (
        call(criterion, [student_of(logits, [0, 1, 2])], targets) for criterion in (LevelSetCriterion(), BoxInstCriterion())
    )
    for name in ("loss_projection", "loss_mask", "loss_dice"):
        torch.testing.assert_close(ours[name], theirs[name])
    costs = [criterion.matching_cost(logits, targets, global_step=0) for criterion in (LevelSetCriterion(), BoxInstCriterion())]
    assert torch.equal(*costs)


def test_an_instance_with_a_real_mask_prices_bce_and_dice_and_no_box_term():
    targets = make_targets(has_mask=[False, True, False])
    targets.masks_GHW = ellipses(targets)
    logits = torch.randn(3, *GRID, requires_grad=True)
    losses = call(LevelSetCriterion(), [student_of(logits, [0, 1, 2])], targets)
    box_terms = losses["loss_projection"] + losses["loss_level_set"] + losses["loss_local_consistency"]
    (box_gradient,) = torch.autograd.grad(box_terms, logits, retain_graph=True)
    (mask_gradient,) = torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], logits)
    assert [bool(row.any()) for row in box_gradient] == [True, False, True]
    assert [bool(row.any()) for row in mask_gradient] == [False, True, False]


def test_the_features_take_no_gradient():
    targets, output = make_targets(), make_output(num_layers=1)
    criterion = make_set_criterion(LevelSetCriterion())
    (gradient,) = torch.autograd.grad(price(criterion, output, targets).total, output.mask_features, allow_unused=True)
    assert gradient is None


def test_a_mask_of_one_kind_costs_less_than_one_across_the_kinds():
    """Left half of the box red, right half blue: following the colours beats an even mask and a mask of the upper half."""
    targets = make_targets([[8, 8, 32, 24]], [0], [0], num_images=1)
    images = torch.zeros(1, 3, *INPUT)
    images[:, 0, :, :20], images[:, 2, :, 20:] = 1, 1
    left, upper = torch.full((1, *GRID), -8.0), torch.full((1, *GRID), -8.0)
    left[:, 2:6, 2:5], upper[:, 2:4, 2:8] = 8, 8
    losses = [
        call(
            LevelSetCriterion(feature_weight=0),
            [student_of(logits, [0], num_images=1)],
            targets,
            images=(images, torch.ones(1, *INPUT)),
        )
        for logits in (left, upper, torch.zeros(1, *GRID))
    ]
    energies = [loss["loss_level_set"].item() for loss in losses]
    assert energies[0] < 0.01 * min(energies[1:])
    assert losses[0]["loss_local_consistency"] < losses[1]["loss_local_consistency"]


def test_what_stands_in_the_padding_changes_nothing():
    targets = make_targets([[4, 4, 36, 24]], [0], [0], num_images=1)  # the box reaches into the padding
    images, pixel_mask = make_images(1)
    pixel_mask[:, :, 30:] = 0
    other = images.clone()
    other[:, :, :, 30:] = 0.3
    students = [student_of(torch.randn(1, *GRID), [0], num_images=1)]
    one, two = (call(LevelSetCriterion(), students, targets, images=(i, pixel_mask)) for i in (images, other))
    assert one["loss_local_consistency"].item() == pytest.approx(two["loss_local_consistency"].item())
    only_image = LevelSetCriterion(feature_weight=0)
    one, two = (call(only_image, students, targets, images=(i, pixel_mask)) for i in (images, other))
    assert one["loss_level_set"].item() == pytest.approx(two["loss_level_set"].item(), rel=1e-4)


def test_cells_that_are_partly_padding_are_not_valid():
    pixel_mask = torch.ones(1, *INPUT)
    pixel_mask[:, :, 30:] = 0
    _, valid = colors_on_grid(torch.rand(1, 3, *INPUT), pixel_mask, *GRID)
    assert valid[0, 0].tolist() == [True] * 7 + [False] * 3


@pytest.mark.parametrize("boxes", [[[12, 12, 13, 13]], [[38, 30, 40, 32]]])
def test_one_pixel_boxes_and_boxes_in_the_padding_give_finite_losses(boxes):
    targets = make_targets(boxes, [0], [0], num_images=2)
    images, pixel_mask = make_images()
    pixel_mask[:, 24:, 32:] = 0
    output = make_output()
    result = price(make_set_criterion(LevelSetCriterion()), output, targets, images=(images, pixel_mask))
    assert all(loss.isfinite() for loss in result.losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(output, result.total))


@pytest.mark.parametrize("num_instances", [0, 3])
def test_names_of_the_losses_do_not_depend_on_the_batch(num_instances):
    targets = make_targets() if num_instances else make_targets([], num_images=2)
    assert list(price(make_set_criterion(LevelSetCriterion()), make_output(), targets).losses) == KEYS


def test_a_batch_of_huge_logits_without_instances_prices_exactly_nothing():
    output = make_output(scale=1.0)
    with torch.no_grad():
        for logits in leaves_of(output)[1::2]:
            logits.fill_(3e38)
    losses = price(make_set_criterion(LevelSetCriterion()), output, make_targets([], num_images=2)).losses
    assert [losses[name].item() for name in KEYS[1:]] == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_give_finite_float32_losses_and_gradients(dtype):
    output = make_output(dtype=dtype)
    result = price(make_set_criterion(LevelSetCriterion()), output, make_targets())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in result.losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(output, result.total))
