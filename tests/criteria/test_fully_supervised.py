"""Full supervision: Mask2Former's own loss up to the documented differences."""

import pytest
import torch
from synthetic_outputs import (
    GRID,
    INPUT,
    NUM_CLASSES,
    NUM_QUERIES,
    ellipses,
    gradients,
    image_part,
    layers_of,
    make_output,
    make_set_criterion,
    make_targets,
    normalizers_of,
    price,
)
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from sim_hf.criteria import fully_supervised
from sim_hf.criteria.fully_supervised import FullySupervisedCriterion


def with_masks(**options):
    targets = make_targets(has_mask=[True] * 3, **options)
    targets.masks_GHW = ellipses(targets)
    return targets


def make_good_output(targets, *, num_layers=3):
    """Query g of an image shows instance g of it, roughly: every matcher agrees."""
    output = make_output(num_layers=num_layers, scale=0.5)
    masks_GHW = torch.nn.functional.adaptive_avg_pool2d(targets.masks_GHW.float()[:, None], GRID)[:, 0]
    with torch.no_grad():
        for layer in layers_of(output):
            for image in range(targets.num_images):
                rows = (targets.image_ids_G == image).nonzero()[:, 0].tolist()
                layer["masks_queries_logits"][image] -= 3
                for query, row in enumerate(rows):
                    layer["masks_queries_logits"][image, query] += 6 * masks_GHW[row]
                    layer["class_queries_logits"][image, query, targets.class_labels_G[row]] += 3
    return output


def transformers_losses(output, targets, points):
    """Cross-entropy, BCE and Dice of `transformers`, weighted, over all layers, at the given points for every row."""
    config = Mask2FormerConfig(num_labels=NUM_CLASSES, num_queries=NUM_QUERIES, train_num_points=points.shape[1])
    loss = Mask2FormerLoss(config, {})
    loss.sample_points_using_uncertainty = lambda logits, *_: points.expand(len(logits), -1, -1)
    of_image = [targets.image_ids_G == image for image in range(targets.num_images)]
    parts = loss(
        output.masks_queries_logits,
        output.class_queries_logits,
        [targets.masks_GHW[rows].float() for rows in of_image],
        [targets.class_labels_G[rows] for rows in of_image],
        auxiliary_predictions=output.auxiliary_logits,
    )
    weights = {"loss_cross_entropy": config.class_weight, "loss_mask": config.mask_weight, "loss_dice": config.dice_weight}
    return {name: weight * sum(v for k, v in parts.items() if k.startswith(name)) for name, weight in weights.items()}


def test_losses_and_gradients_are_those_of_transformers_at_the_same_points(monkeypatch):
    targets = with_masks()
    output, points = make_good_output(targets), torch.rand(1, 50, 2)
    monkeypatch.setattr(fully_supervised, "uncertain_points", lambda logits, *_, **__: points.expand(len(logits), -1, -1))
    losses = price(make_set_criterion(FullySupervisedCriterion()), output, targets).losses
    expected = transformers_losses(output, targets, points)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(output, sum(losses.values())), gradients(output, sum(expected.values())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_good_predictions_are_matched_to_their_instances():
    targets = with_masks()
    positives = price(make_set_criterion(FullySupervisedCriterion()), make_good_output(targets), targets).positives
    assert positives.instance_ids_N.tolist() == [0, 1, 2]


def test_an_instance_without_a_mask_prices_no_mask_loss():
    targets = with_masks()
    targets.has_mask_G = torch.tensor([True, False, True])
    output = make_good_output(targets, num_layers=1)
    losses = price(make_set_criterion(FullySupervisedCriterion()), output, targets).losses
    *_, gradient = gradients(output, losses["loss_mask"] + losses["loss_dice"])
    touched = gradient.flatten(2).any(2).nonzero().tolist()
    assert touched == [[0, 0], [1, 0]]


def test_an_instance_without_a_mask_is_matched_by_its_class():
    targets = make_targets([[4, 4, 20, 24]], [2], [0], num_images=1)
    output = make_output(1, num_layers=1)
    result = price(make_set_criterion(FullySupervisedCriterion()), output, targets)
    best = int(output.class_queries_logits[0].softmax(-1)[:, 2].argmax())
    assert torch.equal(result.positives.mask_logits_NHW[0], output.masks_queries_logits[0, best])


@pytest.mark.parametrize("targets", [make_targets(), make_targets([], num_images=2)], ids=["boxes only", "no instance"])
def test_without_masks_the_losses_are_zero_and_named_and_reach_every_output(targets):
    output = make_output()
    losses = price(make_set_criterion(FullySupervisedCriterion()), output, targets).losses
    assert list(losses) == ["loss_cross_entropy", "loss_mask", "loss_dice"]
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    for gradient in gradients(output, sum(losses.values())):
        assert gradient is not None and gradient.isfinite().all()


def test_masks_of_no_instance_of_the_batch_are_a_normal_batch():
    targets = make_targets([], num_images=2, masks=torch.zeros(0, *INPUT, dtype=torch.bool))
    losses = price(make_set_criterion(FullySupervisedCriterion()), make_output(), targets).losses
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0


def test_points_do_not_depend_on_the_split_into_micro_batches():
    criterion, targets = make_set_criterion(FullySupervisedCriterion(num_points=20)), with_masks()
    output = make_good_output(targets)
    joint = price(criterion, output, targets, step=7)
    parts = []
    for image in range(2):
        of_image = targets.select(targets.image_ids_G == image)
        of_image.image_ids_G, of_image.num_images = torch.zeros_like(of_image.image_ids_G), 1
        parts.append(of_image)
    normalizers = normalizers_of(criterion, *parts)
    halves = [
        price(criterion, image_part(output, image), part, step=7, normalizers=normalizers) for image, part in enumerate(parts)
    ]
    for name, loss in joint.losses.items():
        torch.testing.assert_close(loss, sum(half.losses[name] for half in halves), rtol=1e-5, atol=1e-6)


def test_points_change_from_step_to_step_and_repeat_for_the_same_step():
    criterion, targets = make_set_criterion(FullySupervisedCriterion(num_points=20)), with_masks()
    output = make_good_output(targets)
    first, again, other = (price(criterion, output, targets, step=step).losses["loss_mask"] for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_matching_cost_lies_between_zero_and_one_and_prefers_the_right_mask():
    targets = with_masks()
    masks_GHW = torch.nn.functional.adaptive_avg_pool2d(targets.masks_GHW.float()[:, None], GRID)[:, 0]
    cost_QG = FullySupervisedCriterion().matching_cost(20 * masks_GHW - 10, targets, global_step=0)
    assert cost_QG.min() >= 0 and cost_QG.max() <= 1
    assert cost_QG.argmin(1).tolist() == [0, 1, 2]
