"""The detection side: class loss, denominators of the whole step, positives of student and teacher."""

import math

import pytest
import torch
from synthetic_outputs import (
    CHANNELS,
    GRID,
    NUM_CLASSES,
    NUM_QUERIES,
    gradients,
    image_part,
    layers_of,
    leaves_of,
    make_images,
    make_output,
    make_set_criterion,
    make_targets,
    normalizers_of,
    price,
)

from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.set_criterion import StepNormalizers
from sim_hf.structures import CriterionOutput


class MaskCriterionThatRemembers:
    """Prices nothing and keeps what it was given."""

    def matching_cost(self, mask_logits_QHW, targets, *, global_step):
        return mask_logits_QHW.flatten(1).mean(1)[:, None].sigmoid().expand(-1, len(targets))

    def needs_teacher(self, global_step):
        return global_step > 3

    def __call__(self, students, teacher, targets, images_BCHW, pixel_mask_BHW, *, num_instances, global_step):
        self.students, self.teacher, self.num_instances = students, teacher, num_instances
        return CriterionOutput({})


def slow_class_loss(output, matched, targets, no_object_weight):
    """Weighted cross-entropy of every query of every layer in Python floats -> (weighted sum, sum of the weights)."""
    total, weights = 0.0, 0.0
    for layer, matches in zip(layers_of(output), matched, strict=True):
        wanted = {}
        for image, query, instance in zip(*(t.tolist() for t in (matches.images_N, matches.queries_N, matches.instance_ids_N))):
            wanted[image, query] = int(targets.class_labels_G[instance])
        for image, logits_QK in enumerate(layer["class_queries_logits"].tolist()):
            for query, logits in enumerate(logits_QK):
                label = wanted.get((image, query), NUM_CLASSES)
                weight = no_object_weight if label == NUM_CLASSES else 1.0
                total += weight * (math.log(sum(math.exp(x) for x in logits)) - logits[label])
                weights += weight
    return total, weights / len(matched)


def test_class_loss_equals_a_slow_loop():
    criterion, output, targets = make_set_criterion(MaskCriterionThatRemembers()), make_output(), make_targets()
    matched = criterion.matcher(
        [(layer["class_queries_logits"], layer["masks_queries_logits"]) for layer in layers_of(output)], targets, global_step=0
    )
    total, weights = slow_class_loss(output, matched, targets, 0.1)
    loss = price(criterion, output, targets).losses["loss_cross_entropy"]
    assert weights == pytest.approx(3 + 0.1 * 9)
    assert loss.item() == pytest.approx(2.0 * total / weights, rel=1e-5)


def test_class_loss_by_hand_for_a_network_that_knows_nothing():
    # Uniform logits: every query costs log(4), whatever its class, and the weighted mean of a constant is the constant.
    output = make_output(scale=0.0, num_layers=2)
    criterion = make_set_criterion(MaskCriterionThatRemembers(), class_weight=1.0)
    assert price(criterion, output, make_targets()).losses["loss_cross_entropy"].item() == pytest.approx(2 * math.log(4))


def test_counts_say_instances_and_class_weights():
    criterion = make_set_criterion(MaskCriterionThatRemembers(), no_object_weight=0.25)
    # Two images with 6 queries each: three matched, nine not.
    assert criterion.counts(make_targets()) == pytest.approx((3.0, 3 + 0.25 * 9))
    assert criterion.counts(make_targets([], num_images=2)) == pytest.approx((0.0, 0.25 * 12))


def test_counts_of_an_image_with_more_instances_than_queries_are_those_of_the_loss():
    num = NUM_QUERIES + 2
    targets = make_targets([[0, 0, 8, 8]] * num, [0] * num, [0] * num, num_images=1)
    criterion = make_set_criterion(MaskCriterionThatRemembers())
    assert criterion.counts(targets) == (num, NUM_QUERIES)  # all queries are matched, all instances are counted
    result = price(criterion, make_output(1), targets)
    assert len(result.positives.instance_ids_N) == NUM_QUERIES


def test_a_step_without_anything_has_denominators_that_divide():
    normalizers = StepNormalizers.from_counts(0.0, 0.0)
    assert normalizers.num_instances == 1.0 and normalizers.class_weight > 0


def test_two_micro_batches_give_the_gradient_of_the_joint_batch():
    criterion = make_set_criterion(BoxInstCriterion())
    output, targets, (images, pixel_mask) = make_output(), make_targets(), make_images()
    joint = gradients(output, price(criterion, output, targets, images=(images, pixel_mask)).total)
    parts = []
    for image in range(2):
        of_image = targets.select(targets.image_ids_G == image)
        of_image.image_ids_G = torch.zeros_like(of_image.image_ids_G)
        of_image.num_images = 1
        parts.append(of_image)
    normalizers = normalizers_of(criterion, *parts)
    assert normalizers == normalizers_of(criterion, targets)
    for image, of_image in enumerate(parts):
        half = image_part(output, image)
        picture = (images[image : image + 1], pixel_mask[image : image + 1])
        total = price(criterion, half, of_image, normalizers=normalizers, images=picture).total
        for mine, both in zip(gradients(half, total), joint, strict=True):
            torch.testing.assert_close(mine[0], both[image], rtol=1e-5, atol=1e-7)


def test_a_batch_without_instances_prices_no_object_only_and_reaches_every_output():
    criterion, output = make_set_criterion(BoxInstCriterion()), make_output()
    result = price(criterion, output, make_targets([], num_images=2))
    assert result.losses["loss_cross_entropy"] > 0
    assert result.total.item() == pytest.approx(result.losses["loss_cross_entropy"].item())
    for gradient in gradients(output, result.total):
        assert gradient is not None and gradient.isfinite().all()


def test_an_image_without_instances_beside_one_with_instances():
    targets = make_targets([[4, 4, 20, 24]], [1], [1], num_images=2)
    result = price(make_set_criterion(BoxInstCriterion()), output := make_output(), targets)
    assert result.positives.instance_ids_N.tolist() == [0]
    mask_gradient = gradients(output, result.total)[-1]
    assert mask_gradient[0].abs().sum() == 0 and mask_gradient[1].abs().sum() > 0


def test_a_mask_criterion_that_reads_no_mask_still_leaves_a_gradient_for_every_output():
    output = make_output()
    total = price(make_set_criterion(MaskCriterionThatRemembers()), output, make_targets()).total
    assert all(gradient is not None for gradient in gradients(output, total))


def test_students_are_the_layers_in_order_and_positives_the_last():
    mask_criterion, output = MaskCriterionThatRemembers(), make_output(num_layers=3)
    result = price(make_set_criterion(mask_criterion), output, make_targets())
    assert len(mask_criterion.students) == 3
    assert torch.equal(result.positives.mask_logits_NHW, mask_criterion.students[-1].mask_logits_NHW)
    assert torch.equal(result.positives.instance_ids_N, mask_criterion.students[-1].instance_ids_N)
    assert mask_criterion.teacher is None
    for student, layer in zip(mask_criterion.students, layers_of(output), strict=True):
        maps_MHW = layer["masks_queries_logits"].flatten(0, 1)
        assert all((row == maps_MHW).flatten(1).all(1).any() for row in student.mask_logits_NHW)
        assert sorted(student.instance_ids_N.tolist()) == [0, 1, 2]


def test_scores_are_the_probability_of_the_instances_class():
    mask_criterion, output = MaskCriterionThatRemembers(), make_output(num_layers=1)
    targets = make_targets()
    price(make_set_criterion(mask_criterion), output, targets)
    (student,) = mask_criterion.students
    for row, instance in enumerate(student.instance_ids_N.tolist()):
        image = int(targets.image_ids_G[instance])
        same_QHW = output.masks_queries_logits[image] == student.mask_logits_NHW[row]
        query = int(same_QHW.flatten(1).all(1).nonzero())
        probability = output.class_queries_logits[image, query].softmax(-1)[targets.class_labels_G[instance]]
        assert student.scores_N[row].item() == pytest.approx(probability.item())
    assert not student.scores_N.requires_grad


def test_positives_of_the_teacher_are_its_matched_queries_of_all_layers():
    mask_criterion, teacher_output = MaskCriterionThatRemembers(), make_output(num_layers=3, seed=9)
    price(make_set_criterion(mask_criterion), make_output(num_layers=2), make_targets(), teacher=teacher_output)
    teacher = mask_criterion.teacher
    assert teacher.instance_ids_N.bincount().tolist() == [3, 3, 3]
    assert teacher.mask_logits_NHW.shape == (9, *GRID)
    assert torch.equal(teacher.mask_features_BCHW, teacher_output.mask_features)
    assert teacher.mask_features_BCHW.shape[1] == CHANNELS
    assert not teacher.mask_logits_NHW.requires_grad and not teacher.scores_N.requires_grad


@pytest.mark.parametrize("positives, of_each", [("layers", 3), ("final", 1), ("many", 5)])
def test_kinds_of_positives_of_the_teacher(positives, of_each):
    mask_criterion = MaskCriterionThatRemembers()
    criterion = make_set_criterion(mask_criterion, positives=positives)
    price(criterion, make_output(num_layers=2), make_targets(), teacher=make_output(num_layers=3, seed=9))
    assert mask_criterion.teacher.instance_ids_N.bincount().tolist() == [min(of_each, NUM_QUERIES)] * 3


def test_without_auxiliary_predictions_the_final_one_is_the_only_layer():
    mask_criterion = MaskCriterionThatRemembers()
    price(make_set_criterion(mask_criterion), make_output(num_layers=1), make_targets())
    assert len(mask_criterion.students) == 1


def test_needs_teacher_is_the_mask_criterions_answer():
    criterion = make_set_criterion(MaskCriterionThatRemembers())
    assert not criterion.needs_teacher(3) and criterion.needs_teacher(4)


def test_denominators_reach_the_mask_criterion():
    mask_criterion, targets = MaskCriterionThatRemembers(), make_targets()
    price(make_set_criterion(mask_criterion), make_output(), targets, normalizers=StepNormalizers(17.0, 40.0))
    assert mask_criterion.num_instances == 17.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_priced_in_float32(dtype):
    criterion, output = make_set_criterion(BoxInstCriterion()), make_output(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = price(criterion, output, make_targets())
    assert all(loss.dtype == torch.float32 for loss in result.losses.values())
    assert result.positives.mask_logits_NHW.dtype == torch.float32
    for leaf, gradient in zip(leaves_of(output), gradients(output, result.total), strict=True):
        assert gradient.dtype == leaf.dtype and gradient.isfinite().all()


def prompted(output, targets, *, num_prompts=2, seed=9):
    """The same output with predictions for prompts in every layer."""
    asked = make_output(targets.num_images, num_layers=len(layers_of(output)), seed=seed)
    for layer, answer in zip(layers_of(output), layers_of(asked), strict=True):
        layer |= {
            "class_prompts_logits": answer["class_queries_logits"][:, :num_prompts],
            "masks_prompts_logits": answer["masks_queries_logits"][:, :num_prompts],
        }
        if layer["class_queries_logits"] is output.class_queries_logits:
            output.class_prompts_logits = layer["class_prompts_logits"]
            output.masks_prompts_logits = layer["masks_prompts_logits"]
    return output


def test_a_prompt_is_one_more_positive_of_its_instance_for_student_and_teacher():
    mask_criterion = MaskCriterionThatRemembers()
    criterion, targets = make_set_criterion(mask_criterion), make_targets()
    price(criterion, make_output(), targets, teacher=make_output(seed=1))
    students, teacher = mask_criterion.students, mask_criterion.teacher
    output, teacher_output = prompted(make_output(), targets), prompted(make_output(seed=1), targets)
    result = price(criterion, output, targets, teacher=teacher_output)
    for layer, before, now in zip(layers_of(output), students, mask_criterion.students, strict=True):
        assert torch.equal(now.mask_logits_NHW[:3], before.mask_logits_NHW)
        answers = layer.get("masks_prompts_logits", output.masks_prompts_logits)
        assert torch.equal(now.mask_logits_NHW[3:], answers[[0, 0, 1], [0, 1, 0]])
        assert now.instance_ids_N[3:].tolist() == [0, 1, 2]
        classes = layer.get("class_prompts_logits", output.class_prompts_logits)[[0, 0, 1], [0, 1, 0]]
        expected = classes.softmax(-1)[[0, 1, 2], targets.class_labels_G]
        assert torch.equal(now.scores_N[3:], expected)
    assert len(mask_criterion.teacher.instance_ids_N) == len(teacher.instance_ids_N) + 3 * 3
    assert torch.equal(mask_criterion.teacher.mask_logits_NHW[:9], teacher.mask_logits_NHW)
    assert torch.equal(result.positives.mask_logits_NHW, students[-1].mask_logits_NHW)  # to look at: what was found by itself


def test_class_loss_of_prompts_equals_a_slow_loop():
    criterion, targets = make_set_criterion(MaskCriterionThatRemembers()), make_targets()
    output = prompted(make_output(), targets)
    total = 0.0
    for layer in [*output.auxiliary_logits, vars(output)]:
        for image, prompt, label in ((0, 0, 0), (0, 1, 2), (1, 0, 1)):
            logits = layer["class_prompts_logits"][image, prompt].tolist()
            total += math.log(sum(math.exp(x) for x in logits)) - logits[label]
    result = price(criterion, output, targets)
    assert float(result.losses["loss_prompt_class"].detach()) == pytest.approx(2.0 * total / 3, rel=1e-5)
    assert "loss_prompt_class" not in price(criterion, make_output(), targets).losses


def test_instances_beyond_the_prompts_have_none():
    mask_criterion = MaskCriterionThatRemembers()
    criterion, targets = make_set_criterion(mask_criterion), make_targets()
    price(criterion, prompted(make_output(), targets, num_prompts=1), targets)
    assert mask_criterion.students[-1].instance_ids_N[3:].tolist() == [0, 2]


def test_prompts_without_an_instance_in_the_batch_cost_nothing_and_have_a_gradient():
    criterion, targets = make_set_criterion(BoxInstCriterion()), make_targets([])
    output = prompted(make_output(), targets, num_prompts=1)
    result = price(criterion, output, targets)
    assert float(result.losses["loss_prompt_class"].detach()) == 0
    found = torch.autograd.grad(result.total, [output.masks_prompts_logits, output.class_prompts_logits], allow_unused=True)
    assert all(gradient is not None and not gradient.any() for gradient in found)
