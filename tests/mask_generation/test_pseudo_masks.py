"""The generator: the parts in their order, the pixels it gives to the prototypes, chunks and edge cases."""

import pytest
import torch

from sim_hf.mask_generation import (
    PrototypeBank,
    PseudoMaskGenerator,
    instance_probability_map,
    positive_mask_weights,
    predicted_boxes,
    self_correction,
    semantic_probability_map,
)
from sim_hf.mask_generation.pseudo_masks import evenly_spaced
from sim_hf.structures import InstanceTargets, MaskPredictions, box_masks

SQUARE = slice(4, 12)


def square_scene(num_images=1, feature_dim=4):
    """Every image holds one 32-pixel square object (grid cells 4..11 of 16) whose features point along axis 0; the
    background points along axis 1. Box and teacher mask are the square's."""
    features_BCHW = torch.zeros(num_images, feature_dim, 16, 16)
    features_BCHW[:, 1] = 1.0
    features_BCHW[:, :, SQUARE, SQUARE] = torch.eye(feature_dim)[0][:, None, None]
    mask_logits_NHW = torch.full((num_images, 16, 16), -5.0)
    mask_logits_NHW[:, SQUARE, SQUARE] = 5.0
    images = torch.arange(num_images)
    boxes_G4 = torch.tensor([[16.0, 16.0, 48.0, 48.0]]).repeat(num_images, 1)
    targets = InstanceTargets(boxes_G4, torch.zeros_like(images), images, (64, 64), num_images)
    return MaskPredictions(mask_logits_NHW, images, torch.ones(num_images), features_BCHW), targets


def random_scene(num_instances=9, num_images=3, num_positives=25, dtype=torch.float32):
    images = torch.arange(num_instances) % num_images
    corner_G2 = torch.rand(num_instances, 2) * 40
    boxes_G4 = torch.cat([corner_G2, corner_G2 + 8 + torch.rand(num_instances, 2) * 16], 1)
    targets = InstanceTargets(boxes_G4, torch.randint(0, 3, (num_instances,)), images, (64, 64), num_images)
    instance_ids_N = torch.randint(0, num_instances - 1, (num_positives,))  # the last instance has no positive
    teacher = MaskPredictions(
        (torch.randn(num_positives, 16, 16) * 4 + 2).to(dtype),
        instance_ids_N,
        torch.rand(num_positives),
        torch.randn(num_images, 8, 16, 16).to(dtype),
    )
    return teacher, targets


def ready_bank(feature_dim=8):
    bank = PrototypeBank(3, 4, feature_dim)
    bank.observe(torch.randn(300, feature_dim), torch.randint(0, 2, (300,)))  # class 2 stays without prototypes
    bank.commit()
    return bank


def assert_same_masks(left, right):
    assert torch.equal(left.probabilities_GHW, right.probabilities_GHW)
    assert torch.equal(left.target_GHW, right.target_GHW)
    assert torch.equal(left.trusted_GHW, right.trusted_GHW)
    assert torch.equal(left.scores_G, right.scores_G)


def test_object_is_found_before_and_after_the_first_commit():
    bank = PrototypeBank(1, 3, 4)
    generate = PseudoMaskGenerator(bank)
    teacher, targets = square_scene()
    expected_GHW = box_masks(targets.boxes_G4, 16, 16, 4.0)
    first = generate(teacher, targets)
    assert torch.equal(first.target_GHW, expected_GHW) and first.trusted_GHW.all()
    torch.testing.assert_close(first.scores_G, torch.tensor([5.0]).sigmoid())  # no prototypes yet: M = M_I
    bank.commit()
    torch.testing.assert_close(bank.prototypes_KLC[0, :, 0], torch.ones(3))
    second = generate(teacher, targets)
    assert torch.equal(second.target_GHW, expected_GHW)
    torch.testing.assert_close(second.scores_G, (torch.tensor([5.0]).sigmoid() + torch.tensor([10.0]).sigmoid()) / 2)


def test_prototypes_remove_background_that_the_teacher_takes_for_object():
    bank = PrototypeBank(1, 3, 4)
    generate = PseudoMaskGenerator(bank)
    generate(*square_scene())
    bank.commit()
    teacher, targets = square_scene()
    targets.boxes_G4[:] = torch.tensor([0.0, 0.0, 64.0, 64.0])
    teacher.mask_logits_NHW[:, :2] = 0.5  # two rows of background at probability 0.62
    masks = generate(teacher, targets, update_prototypes=False)
    assert not masks.target_GHW[:, :2].any()
    assert masks.target_GHW.sum() == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_equals_the_parts_called_one_by_one_for_every_chunk_size(chunk_size, dtype):
    bank = ready_bank()
    teacher, targets = random_scene(dtype=dtype)
    masks = PseudoMaskGenerator(bank, chunk_size=chunk_size, alpha=0.4, mu=3.0)(teacher, targets)
    boxes_N4 = predicted_boxes(teacher.mask_logits_NHW, 4.0)
    weights_N = positive_mask_weights(boxes_N4, targets.boxes_G4, teacher.instance_ids_N, mu=3.0)
    instance_GHW = instance_probability_map(teacher.mask_logits_NHW, weights_N, teacher.instance_ids_N, len(targets))
    semantic_GHW = semantic_probability_map(teacher.mask_features_BCHW, bank, targets)
    ready_G = bank.is_ready_K[targets.class_labels_G]
    assert ready_G.any() and not ready_G.all()
    expected = self_correction(semantic_GHW, instance_GHW, targets.boxes_G4, stride=4.0, alpha=0.4, semantic_ready_G=ready_G)
    torch.testing.assert_close(masks.probabilities_GHW, expected.probabilities_GHW, rtol=1e-6, atol=0)
    assert (masks.target_GHW == expected.target_GHW).float().mean() > 0.999
    assert (masks.trusted_GHW == expected.trusted_GHW).float().mean() > 0.999
    assert not masks.trusted_GHW[-1].any()


def test_collected_pixels_are_the_confident_ones_inside_the_box():
    teacher, targets = square_scene()
    targets.boxes_G4[:] = torch.tensor([16.0, 16.0, 32.0, 48.0])  # the left half of the object
    bank = PrototypeBank(1, 3, 4)
    PseudoMaskGenerator(bank)(teacher, targets)
    assert len(bank._observed_pixels()[1]) == 32
    assert torch.equal(bank._observed_pixels()[0], torch.eye(4)[0].expand(32, 4))


def ground_pixels(bank):
    pixels_MC, labels_M, _ = bank._observed_pixels()
    return pixels_MC[labels_M == 1]


@pytest.mark.parametrize("competition", [False, True])
def test_background_is_learned_inside_the_box_where_the_instance_is_not(competition):
    teacher, targets = square_scene()
    targets.boxes_G4[:] = torch.tensor([16.0, 16.0, 64.0, 48.0])  # the object and as many cells of background, halved
    bank = PrototypeBank(2, 3, 4)
    PseudoMaskGenerator(bank, background_prototypes=True, pixel_competition=competition)(teacher, targets)
    assert torch.equal(ground_pixels(bank), torch.eye(4)[1].expand(32, 4))


def test_a_neighbour_inside_the_box_is_not_background():
    teacher, _ = square_scene(num_images=1)
    two = InstanceTargets(
        torch.tensor([[16.0, 16.0, 48.0, 48.0], [0.0, 16.0, 64.0, 48.0]]), torch.tensor([0, 0]), torch.tensor([0, 0]), (64, 64), 1
    )
    aside = torch.full((1, 16, 16), -5.0)
    aside[:, SQUARE, :4] = 5.0  # the second instance stands left of the first and its box reaches over it
    joint = MaskPredictions(
        torch.cat([teacher.mask_logits_NHW, aside]), torch.tensor([0, 1]), torch.ones(2), teacher.mask_features_BCHW
    )
    bank = PrototypeBank(2, 3, 4)
    PseudoMaskGenerator(bank, background_prototypes=True, pixel_competition=True)(joint, two)
    claimed = (ground_pixels(bank)[:, 0] > 0).sum()
    assert len(ground_pixels(bank)) >= 32 and claimed <= 12  # of 64: the corners, where the first instance's claim fades


def test_an_instance_that_is_seen_nowhere_gives_no_background():
    teacher, targets = square_scene()
    teacher.mask_logits_NHW[:] = -5.0
    bank = PrototypeBank(2, 3, 4)
    PseudoMaskGenerator(bank, background_prototypes=True)(teacher, targets)
    assert len(ground_pixels(bank)) == 0


def test_a_bank_without_room_for_backgrounds_is_refused():
    with pytest.raises(ValueError, match="two classes for each"):
        PseudoMaskGenerator(PrototypeBank(3, 2, 4), background_prototypes=True)


def test_update_prototypes_false_collects_nothing():
    bank = PrototypeBank(1, 3, 4)
    PseudoMaskGenerator(bank)(*square_scene(), update_prototypes=False)
    assert len(bank._observed_pixels()[1]) == 0


@pytest.mark.parametrize("chunk_size", [1, 16])
def test_micro_batches_give_the_same_prototypes_and_masks_as_the_whole_batch(chunk_size):
    teacher, targets = random_scene()
    whole = PrototypeBank(3, 4, 8)
    generate = PseudoMaskGenerator(whole, chunk_size=chunk_size, max_pixels_per_instance=7)
    whole_masks = generate(teacher, targets)
    whole.commit()
    split = PrototypeBank(3, 4, 8)
    generate = PseudoMaskGenerator(split, max_pixels_per_instance=7)
    for image in range(3):
        rows_G = (targets.image_ids_G == image).nonzero()[:, 0]
        part = targets.select(rows_G)
        part.image_ids_G.zero_()
        chosen_N = torch.isin(teacher.instance_ids_N, rows_G)
        predictions = MaskPredictions(
            teacher.mask_logits_NHW[chosen_N],
            torch.searchsorted(rows_G, teacher.instance_ids_N[chosen_N]),
            teacher.scores_N[chosen_N],
            teacher.mask_features_BCHW[image : image + 1],
        )
        masks = generate(predictions, part)
        torch.testing.assert_close(masks.probabilities_GHW, whole_masks.probabilities_GHW[rows_G])
    split.commit()
    assert torch.equal(whole.prototypes_KLC, split.prototypes_KLC) and torch.equal(whole.counts_KL, split.counts_KL)


def test_autocast_changes_nothing():
    bank = ready_bank()
    teacher, targets = random_scene()
    generate = PseudoMaskGenerator(bank)
    expected = generate(teacher, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_masks(generate(teacher, targets), expected)


def test_inputs_are_not_changed_and_no_gradient_flows():
    teacher, targets = random_scene()
    teacher.mask_logits_NHW.requires_grad_()
    before = teacher.mask_logits_NHW.detach().clone(), teacher.mask_features_BCHW.clone(), targets.boxes_G4.clone()
    masks = PseudoMaskGenerator(ready_bank())(teacher, targets)
    assert not masks.probabilities_GHW.requires_grad
    after = teacher.mask_logits_NHW.detach(), teacher.mask_features_BCHW, targets.boxes_G4
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("num_images", [1, 2])
def test_batch_without_instances(num_images):
    bank = PrototypeBank(1, 3, 4)
    teacher, targets = square_scene(num_images)
    none = torch.zeros(num_images, dtype=torch.bool)
    teacher = MaskPredictions(
        teacher.mask_logits_NHW[none], teacher.instance_ids_N[none], teacher.scores_N[none], teacher.mask_features_BCHW
    )
    generate = PseudoMaskGenerator(bank)
    targets = targets.select(none)
    masks = generate(teacher, targets)
    assert masks.probabilities_GHW.shape == masks.target_GHW.shape == masks.trusted_GHW.shape == (0, 16, 16)
    assert masks.scores_G.shape == (0,)
    assert generate.diagnostics(masks, targets)["pseudo_trusted_share"] == 0
    bank.commit()
    assert not bank.is_ready_K.any()


def test_instances_without_any_positive():
    teacher, targets = square_scene(2)
    none = torch.zeros(2, dtype=torch.bool)
    teacher = MaskPredictions(
        teacher.mask_logits_NHW[none], teacher.instance_ids_N[none], teacher.scores_N[none], teacher.mask_features_BCHW
    )
    masks = PseudoMaskGenerator(PrototypeBank(1, 3, 4), chunk_size=1)(teacher, targets)
    assert masks.trusted_GHW.shape == (2, 16, 16) and not masks.trusted_GHW.any() and not masks.target_GHW.any()


def test_nan_teacher_mask_is_never_foreground_and_feeds_no_prototype():
    teacher, targets = square_scene()
    teacher.mask_logits_NHW[:] = float("nan")
    bank = PrototypeBank(1, 3, 4)
    masks = PseudoMaskGenerator(bank)(teacher, targets)
    assert not masks.target_GHW.any() and masks.probabilities_GHW.isfinite().all() and masks.scores_G.isfinite().all()
    assert not masks.trusted_GHW[:, SQUARE, SQUARE].any()
    assert len(bank._observed_pixels()[1]) == 0


def test_evenly_spaced_pixels_by_hand():
    instances_V = torch.tensor([0] * 10 + [2] * 3)
    # 10 pixels, 4 wanted: ranks 2, 4, 7, 9; the second instance has none, the third has fewer than 4.
    assert evenly_spaced(instances_V, 3, 4).tolist() == [2, 4, 7, 9, 10, 11, 12]


@pytest.mark.parametrize(("size", "wanted"), [(1, 1), (1, 5), (97, 10), (256, 256), (1000, 256), (257, 256)])
def test_evenly_spaced_pixels_are_exactly_as_many_as_wanted(size, wanted):
    assert len(evenly_spaced(torch.zeros(size, dtype=torch.int64), 1, wanted)) == min(size, wanted)


def test_diagnostics_count_only_pixels_inside_the_boxes():
    bank = PrototypeBank(2, 3, 4)
    generate = PseudoMaskGenerator(bank)
    teacher, targets = square_scene()
    teacher.mask_logits_NHW[:, 4:6, SQUARE] = 0.0  # a quarter of the box is undecided
    masks = generate(teacher, targets)
    bank.commit()
    diagnostics = generate.diagnostics(masks, targets)
    assert float(diagnostics["pseudo_trusted_share"]) == 0.75
    assert float(diagnostics["prototype_ready_share"]) == 0.5
    assert float(diagnostics["prototype_diversity"]) == pytest.approx(1.0, abs=1e-5)  # the object has one colour
    assert set(diagnostics) == {
        "pseudo_trusted_share",
        "prototype_ready_share",
        "prototype_diversity",
        "prototype_usage_entropy",
    }


def test_wrong_arguments_say_what_came():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        PseudoMaskGenerator(PrototypeBank(1), chunk_size=0)
    teacher, targets = square_scene()
    teacher.mask_features_BCHW = teacher.mask_features_BCHW[..., :8]
    with pytest.raises(ValueError, match="share a grid"):
        PseudoMaskGenerator(PrototypeBank(1, 3, 4))(teacher, targets)


def test_predictions_that_miss_the_given_box_make_no_mask():
    """IoU of a square's box with the same box moved by half its side is 1/3: below the gate nothing of it is trusted."""
    teacher, targets = square_scene(num_images=2)
    targets.boxes_G4[1, [0, 2]] += 16
    masks = PseudoMaskGenerator(PrototypeBank(1, 2, 4), min_iou=0.5)(teacher, targets)
    assert masks.target_GHW[0].any() and masks.trusted_GHW[0].any()
    assert not masks.target_GHW[1].any() and not masks.trusted_GHW[1].any()
    lenient = PseudoMaskGenerator(PrototypeBank(1, 2, 4), min_iou=0.3)(teacher, targets)
    assert lenient.target_GHW[1].any()
