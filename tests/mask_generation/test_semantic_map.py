"""Eq. 1: the semantic probability map."""

import math

import pytest
import references_mask_generation as reference
import torch

from sim_hf.mask_generation import PrototypeBank, semantic_probability_map
from sim_hf.mask_generation.semantic_map import ClassSimilarity
from sim_hf.structures import InstanceTargets


def make_targets(image_ids, labels, num_images):
    boxes_G4 = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).repeat(len(labels), 1)
    return InstanceTargets(
        boxes_G4,
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(image_ids, dtype=torch.long),
        (16, 16),
        num_images,
    )


def filled_bank(num_classes=3, num_prototypes=4, feature_dim=6):
    bank = PrototypeBank(num_classes, num_prototypes, feature_dim)
    bank.prototypes_KLC.copy_(torch.nn.functional.normalize(torch.randn_like(bank.prototypes_KLC), dim=-1))
    bank.counts_KL.fill_(1)
    return bank


def test_values_by_hand():
    bank = PrototypeBank(1, 2, 2)
    bank.prototypes_KLC.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    # Pixels along +x, along -x (nearest prototype: y, cosine 0), on the diagonal, and (-1, -1).
    features_BCHW = torch.tensor([[[[2.0, -3.0], [5.0, -1.0]], [[0.0, 0.0], [5.0, -1.0]]]])
    map_GHW = semantic_probability_map(features_BCHW, bank, make_targets([0], [0], 1))
    cosine_HW = torch.tensor([[1.0, 0.0], [math.sqrt(0.5), -math.sqrt(0.5)]])
    torch.testing.assert_close(map_GHW[0], (cosine_HW / 0.1).sigmoid())


def test_background_moves_the_border_between_figure_and_ground_by_hand():
    """Both pixels look like the class (cosine above 0); only one looks more like it than like its background."""
    bank = PrototypeBank(2, 1, 2)  # class 1 is the background of class 0
    bank.prototypes_KLC.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    features_BCHW = torch.tensor([[[[4.0, 3.0]], [[3.0, 4.0]]]])
    targets = make_targets([0], [0], 1)
    plain = ClassSimilarity(features_BCHW, bank, targets).probability_maps()
    torch.testing.assert_close(plain[0, 0], (torch.tensor([0.8, 0.6]) / 0.1).sigmoid())
    against = ClassSimilarity(features_BCHW, bank, targets, background=True).probability_maps()
    torch.testing.assert_close(against[0, 0], (torch.tensor([0.2, -0.2]) / 0.1).sigmoid())


def test_background_without_prototypes_leaves_the_cosine():
    bank = filled_bank(num_classes=6)
    bank.prototypes_KLC[3:] = 0
    features_BCHW, targets = torch.randn(2, bank.feature_dim, 4, 5), make_targets([1, 0, 1], [0, 2, 2], 2)
    plain = ClassSimilarity(features_BCHW, bank, targets).similarity_PHW
    assert torch.equal(ClassSimilarity(features_BCHW, bank, targets, background=True).similarity_PHW, plain)


def test_class_without_prototypes_is_one_half_everywhere():
    bank = PrototypeBank(2, 3, 4)
    assert not bank.is_ready_K.any()
    assert (semantic_probability_map(torch.randn(1, 4, 3, 3), bank, make_targets([0], [1], 1)) == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_equals_the_reference_for_shared_classes_and_images(dtype, autocast):
    bank = filled_bank()
    features_BCHW = (torch.randn(3, 6, 4, 5) * 30).to(dtype)
    image_ids, labels = [2, 0, 0, 2, 0, 2], [1, 2, 0, 1, 2, 0]  # not sorted; image 1 has none; pairs repeat
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        map_GHW = semantic_probability_map(features_BCHW, bank, make_targets(image_ids, labels, 3))
    assert map_GHW.dtype == torch.float32
    expected = reference.semantic_map(features_BCHW.float().numpy(), bank.prototypes_KLC.numpy(), image_ids, labels)
    torch.testing.assert_close(map_GHW.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("feature_dim", [1, 8, 13, 256])
def test_equals_the_plain_form_for_any_number_of_channels(feature_dim):
    bank = filled_bank(feature_dim=feature_dim)
    features_BCHW = torch.randn(2, feature_dim, 4, 5)
    map_GHW = semantic_probability_map(features_BCHW, bank, make_targets([0, 1], [2, 1], 2))
    unit_BCHW = torch.nn.functional.normalize(features_BCHW, dim=1)
    cosine_GLHW = torch.einsum("glc,gchw->glhw", bank.prototypes_KLC[[2, 1]], unit_BCHW)
    torch.testing.assert_close(map_GHW, (cosine_GLHW.amax(1) / 0.1).sigmoid(), rtol=0, atol=2e-6)


def test_half_precision_features_near_the_maximum_stay_finite():
    features_BCHW = torch.full((1, 6, 2, 2), 6e4, dtype=torch.float16)
    assert semantic_probability_map(features_BCHW, filled_bank(), make_targets([0], [0], 1)).isfinite().all()


def test_pixel_of_zeros_is_one_half():
    features_BCHW = torch.zeros(1, 6, 2, 2)
    assert (semantic_probability_map(features_BCHW, filled_bank(), make_targets([0], [0], 1)) == 0.5).all()


def test_lower_temperature_separates_more():
    bank, features_BCHW, targets = filled_bank(), torch.randn(1, 6, 4, 4), make_targets([0], [0], 1)
    sharp, soft = (semantic_probability_map(features_BCHW, bank, targets, temperature=t) for t in (0.05, 1.0))
    assert ((sharp - 0.5).abs() > (soft - 0.5).abs()).all()


def test_no_instances():
    assert semantic_probability_map(torch.randn(2, 6, 3, 4), filled_bank(), make_targets([], [], 2)).shape == (0, 3, 4)


def test_wrong_arguments_say_what_came():
    targets = make_targets([0], [0], 1)
    with pytest.raises(ValueError, match=r"\(B, 6, H, W\), got \(1, 5, 3, 3\)"):
        semantic_probability_map(torch.randn(1, 5, 3, 3), filled_bank(), targets)
    with pytest.raises(ValueError, match="temperature must be positive"):
        semantic_probability_map(torch.randn(1, 6, 3, 3), filled_bank(), targets, temperature=0.0)
