"""The detection side of a dense model: its three losses by hand, its counts, and the positives it hands on."""

import math
from types import SimpleNamespace

import pytest
import torch

from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.dense_assignment import STRIDES, assign_locations, grid_sizes
from sim_hf.criteria.dense_criterion import DenseCriterion, DenseNormalizers
from sim_hf.criteria.sim import SIMCriterion
from sim_hf.mask_generation import PrototypeBank, PseudoMaskGenerator, positive_mask_weights
from sim_hf.structures import CriterionOutput, InstanceTargets

SIZE, NUM_CLASSES, CHANNELS = (64, 64), 3, 4
SIZES = (16.0, 32.0, 64.0, 128.0)
NUM_LOCATIONS = sum(h * w for h, w in grid_sizes(SIZE))
BOXES, LABELS, IMAGES = [[4, 4, 24, 24], [30, 20, 62, 60], [10, 8, 50, 40]], [0, 2, 1], [0, 0, 1]


class Remembering:
    """A mask criterion that prices nothing and keeps what it was given."""

    def needs_teacher(self, global_step):
        return True

    def __call__(self, students, teacher, targets, images_BCHW, pixel_mask_BHW, *, num_instances, global_step):
        self.students, self.teacher, self.num_instances = students, teacher, num_instances
        return CriterionOutput({})


def make_targets(boxes=BOXES, labels=LABELS, images=IMAGES, num_images=2):
    return InstanceTargets(
        boxes_G4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        class_labels_G=torch.tensor(labels, dtype=torch.long),
        image_ids_G=torch.tensor(images, dtype=torch.long),
        input_size=SIZE,
        num_images=num_images,
    )


def make_output(num_images=2, seed=0, images=slice(None)):
    """Random dense predictions; the mask of a location is a plane of one learned number, so no network is needed."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, shift=0.0):
        return (torch.randn(num_images, *shape, generator=generator) + shift)[images].clone().requires_grad_()

    maps = leaf(NUM_LOCATIONS, 16, 16)
    return SimpleNamespace(
        class_logits=leaf(NUM_LOCATIONS, NUM_CLASSES, shift=-3.0),
        box_distances=leaf(NUM_LOCATIONS, 4, shift=12.0),
        centerness_logits=leaf(NUM_LOCATIONS),
        valid_locations=torch.ones(len(maps), NUM_LOCATIONS, dtype=torch.bool),
        mask_features=leaf(CHANNELS, 8, 8),
        maps=maps,
        mask_logits=lambda image_ids_N, locations_N: maps[image_ids_N, locations_N],
    )


def price(criterion, output, targets, teacher=None, normalizers=None, step=10):
    images = torch.zeros(targets.num_images, 3, *SIZE)
    normalizers = normalizers or criterion.normalizers(criterion.counts(targets))
    return criterion(output, teacher, targets, images, images[:, 0] + 1, normalizers=normalizers, global_step=step)


def make_criterion(mask_criterion=None, **options):
    return DenseCriterion(mask_criterion or Remembering(), sizes_of_interest=SIZES, **options)


def test_the_focal_loss_is_that_of_its_equation_over_the_positives():
    targets, output = make_targets(), make_output()
    assigned = assign_locations(targets, sizes_of_interest=SIZES)
    classes = torch.zeros(2, NUM_LOCATIONS, NUM_CLASSES)
    for image, location, instance in zip(assigned.image_ids_N, assigned.locations_N, assigned.instance_ids_N, strict=True):
        classes[image, location, LABELS[instance]] = 1
    p = output.class_logits.sigmoid()
    positive = -0.25 * (1 - p) ** 2 * p.log() * classes
    negative = -0.75 * p**2 * (1 - p).log() * (1 - classes)
    expected = (positive + negative).sum() / len(assigned)
    assert price(make_criterion(), output, targets).losses["loss_focal"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_locations_in_the_padding_are_no_background():
    targets, output = make_targets(), make_output()
    before = price(make_criterion(), output, targets).losses["loss_focal"]
    output.valid_locations[:, 7 * 8 : 8 * 8] = False  # the last row of the first level, where nothing is assigned
    with torch.no_grad():
        output.class_logits[:, 7 * 8 : 8 * 8] = 50.0
    after = price(make_criterion(), output, targets).losses["loss_focal"]
    assert after < before


def test_a_box_that_fits_costs_nothing_and_one_beside_it_the_distance():
    targets, output = make_targets([[16, 16, 48, 48]], [0], [0], num_images=1), make_output(1)
    assigned = assign_locations(targets, sizes_of_interest=SIZES)
    with torch.no_grad():
        output.box_distances[assigned.image_ids_N, assigned.locations_N] = assigned.distances_N4
    assert price(make_criterion(), output, targets).losses["loss_giou"].item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():  # half of the width: IoU 1/2, and the hull is the box itself
        output.box_distances[assigned.image_ids_N, assigned.locations_N, 2] = assigned.distances_N4[:, 2] - 16
    assert price(make_criterion(), output, targets).losses["loss_giou"].item() == pytest.approx(0.5, abs=1e-5)


def test_centerness_is_priced_by_its_cross_entropy():
    targets, output = make_targets(), make_output()
    wanted = assign_locations(targets, sizes_of_interest=SIZES)
    p = output.centerness_logits[wanted.image_ids_N, wanted.locations_N].sigmoid()
    target = wanted.centerness()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert price(make_criterion(), output, targets).losses["loss_centerness"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_counts_are_those_of_the_assignment():
    targets = make_targets()
    assigned = assign_locations(targets, sizes_of_interest=SIZES)
    positives, centerness, masks = make_criterion(mask_positives=4).counts(targets)
    assert positives == len(assigned) and centerness == pytest.approx(assigned.centerness().sum().item())
    assert masks == 2 + 2 + 4  # four of an image, shared by its instances


def test_no_instance_in_the_batch_gives_finite_losses_and_every_output_a_gradient():
    targets, output = make_targets([], [], []), make_output()
    price(make_criterion(BoxInstCriterion()), output, targets).total.backward()
    for name in ("class_logits", "box_distances", "centerness_logits", "maps"):
        assert getattr(output, name).grad is not None and getattr(output, name).grad.isfinite().all()
    assert DenseNormalizers.from_counts(0, 0, 0) == DenseNormalizers(1, 1e-6, 1)


@pytest.mark.parametrize("supervision", ["boxinst", "sim"])
def test_a_batch_in_two_parts_has_the_gradient_of_the_whole(supervision):
    def mask_criterion():
        if supervision == "boxinst":
            return BoxInstCriterion(pairwise_warmup_steps=0)
        generator = PseudoMaskGenerator(PrototypeBank(NUM_CLASSES, 2, CHANNELS))
        return SIMCriterion(BoxInstCriterion(), generator, pseudo_start_step=0).train()

    targets, parts = make_targets(), [make_targets(BOXES[:2], LABELS[:2], [0, 0], 1), make_targets(BOXES[2:], LABELS[2:], [0], 1)]
    whole, teacher = make_output(), make_output(seed=5)
    criterion = make_criterion(mask_criterion(), mask_positives=6)
    output = price(criterion, whole, targets, teacher)
    output.total.backward()
    counts = torch.tensor([criterion.counts(part) for part in parts]).sum(0).tolist()
    halves = [make_output(images=slice(i, i + 1)) for i in range(2)]
    total = 0.0
    for i, (half, part) in enumerate(zip(halves, parts, strict=True)):
        result = price(criterion, half, part, make_output(seed=5, images=slice(i, i + 1)), criterion.normalizers(counts))
        result.total.backward()
        total += result.total.item()
    assert total == pytest.approx(output.total.item(), rel=1e-5)
    for name in ("class_logits", "box_distances", "centerness_logits", "maps"):
        joined = torch.cat([getattr(half, name).grad for half in halves])
        torch.testing.assert_close(joined, getattr(whole, name).grad, atol=1e-6, rtol=1e-4)


def test_the_students_best_positives_take_the_masks_and_all_of_the_teachers():
    targets, remembering = make_targets(), Remembering()
    assigned = assign_locations(targets, sizes_of_interest=SIZES)
    student, teacher = make_output(), make_output(seed=1)
    output = price(make_criterion(remembering, mask_positives=2), student, targets, teacher)
    (positives,) = remembering.students
    assert positives.instance_ids_N.tolist() == [0, 1, 2, 2] and remembering.num_instances == 4
    where = (assigned.image_ids_N, assigned.locations_N)
    scores = student.class_logits[(*where, targets.class_labels_G[assigned.instance_ids_N])].sigmoid()
    scores = (scores * student.centerness_logits[where].sigmoid()).sqrt()
    best = max(range(len(assigned)), key=lambda n: scores[n] if assigned.instance_ids_N[n] == 0 else -1)
    torch.testing.assert_close(positives.mask_logits_NHW[0], student.maps[0, assigned.locations_N[best]])
    assert remembering.teacher.instance_ids_N.tolist() == assigned.instance_ids_N.tolist()
    assert remembering.teacher.mask_features_BCHW.shape == (2, CHANNELS, 16, 16)
    assert output.positives.instance_ids_N.tolist() == [0, 1, 2]


def test_the_teachers_masks_are_weighed_by_the_boxes_that_it_predicts():
    """Eq. 6 with FCOS's boxes: one positive's box fits, so exp(mu) against exp(0) for the others."""
    targets, teacher = make_targets([[16, 16, 48, 48]], [0], [0], num_images=1), make_output(1)
    assigned = assign_locations(targets, sizes_of_interest=SIZES)
    with torch.no_grad():
        teacher.box_distances[:] = -1.0  # an empty box
        teacher.box_distances[0, assigned.locations_N[0]] = assigned.distances_N4[0]
        teacher.maps[:] = -20.0
        teacher.maps[0, assigned.locations_N[0]] = 20.0
    remembering = Remembering()
    price(make_criterion(remembering), make_output(1), targets, teacher)
    positives = remembering.teacher
    weights = positive_mask_weights(positives.boxes_N4, targets.boxes_G4, positives.instance_ids_N, mu=5.0)
    others = len(assigned) - 1
    assert weights[0].item() == pytest.approx(math.exp(5) / (math.exp(5) + others), rel=1e-4)
    generator = PseudoMaskGenerator(PrototypeBank(NUM_CLASSES, 2, CHANNELS))
    pseudo = generator(positives, targets, update_prototypes=False)
    inside = pseudo.probabilities_GHW[0, 4:12, 4:12]
    torch.testing.assert_close(inside, weights[0].expand_as(inside), atol=1e-4, rtol=1e-4)


def test_strides_are_those_of_the_network():
    from sim_hf.models.condinst import configuration_condinst

    assert STRIDES == configuration_condinst.STRIDES
