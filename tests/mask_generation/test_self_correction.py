"""Eq. 7 and the two thresholds."""

import pytest
import references_mask_generation as reference
import torch

from sim_hf.mask_generation import adaptive_threshold, self_correction
from sim_hf.structures import box_masks

FULL_BOX = torch.tensor([[0.0, 0.0, 16.0, 16.0]])


def maps(*rows):
    return torch.tensor([rows])


def test_pixels_by_hand():
    semantic_GHW = maps([0.9, 0.9, 0.3, 0.5], [0.9, 0.5, 0.3, 0.5])
    instance_GHW = maps([0.9, 0.6, 0.3, 0.5], [0.1, 0.5, 0.1, 0.1])
    masks = self_correction(semantic_GHW, instance_GHW, torch.tensor([[0.0, 0.0, 16.0, 8.0]]), stride=4.0)
    torch.testing.assert_close(masks.probabilities_GHW, maps([0.9, 0.75, 0.3, 0.5], [0.5, 0.5, 0.2, 0.3]))
    # One pixel is confident, so tau_high is the second largest value, 0.75: the largest alone is foreground.
    assert masks.target_GHW.tolist() == [[[True, False, False, False], [False] * 4]]
    assert masks.trusted_GHW.tolist() == [[[True, False, True, False], [False, False, True, True]]]
    torch.testing.assert_close(masks.scores_G, torch.tensor([0.9]))


def test_outside_the_box_is_trusted_background_whatever_the_maps_say():
    ones_GHW = torch.ones(1, 4, 4)
    masks = self_correction(ones_GHW, ones_GHW, torch.tensor([[4.0, 4.0, 12.0, 12.0]]), stride=4.0)
    inside_GHW = torch.zeros(1, 4, 4, dtype=torch.bool)
    inside_GHW[:, 1:3, 1:3] = True
    assert torch.equal(masks.target_GHW, inside_GHW)
    assert masks.trusted_GHW.all()
    assert torch.equal(masks.probabilities_GHW, inside_GHW.float())


def test_instance_without_positives_trusts_nothing():
    semantic_GHW = torch.full((2, 4, 4), 0.99)
    instance_GHW = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    masks = self_correction(semantic_GHW, instance_GHW, FULL_BOX.expand(2, 4), stride=4.0)
    assert not masks.trusted_GHW[0].any() and not masks.target_GHW[0].any() and masks.scores_G[0] == 0
    assert masks.trusted_GHW[1].all() and masks.target_GHW[1].all()


def test_given_has_positives_overrides_the_map():
    zeros_GHW = torch.zeros(1, 2, 2)
    masks = self_correction(zeros_GHW, zeros_GHW, FULL_BOX, stride=8.0, has_positives_G=torch.tensor([True]))
    assert masks.trusted_GHW.all() and not masks.target_GHW.any()


def test_class_without_prototypes_uses_the_instance_map_alone():
    semantic_GHW, instance_GHW = torch.full((2, 4, 4), 0.5), torch.full((2, 4, 4), 0.9)
    masks = self_correction(
        semantic_GHW, instance_GHW, FULL_BOX.expand(2, 4), stride=4.0, semantic_ready_G=torch.tensor([True, False])
    )
    torch.testing.assert_close(masks.probabilities_GHW[:, 0, 0], torch.tensor([0.7, 0.9]))


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0.2), (0.25, 0.35), (1.0, 0.8)])
def test_alpha_mixes_semantic_and_instance_map(alpha, expected):
    masks = self_correction(torch.full((1, 2, 2), 0.2), torch.full((1, 2, 2), 0.8), FULL_BOX, stride=8.0, alpha=alpha)
    torch.testing.assert_close(masks.probabilities_GHW, torch.full((1, 2, 2), expected))


def test_nan_pixel_is_ignored_and_spoils_no_other():
    semantic_GHW, instance_GHW = torch.full((1, 4, 4), 0.9), torch.full((1, 4, 4), 0.9)
    semantic_GHW[0, 1, 1] = float("nan")
    masks = self_correction(semantic_GHW, instance_GHW, FULL_BOX, stride=4.0)
    assert not masks.trusted_GHW[0, 1, 1] and masks.trusted_GHW.sum() == 15 and masks.target_GHW.sum() == 15
    assert masks.probabilities_GHW.isfinite().all()
    torch.testing.assert_close(masks.scores_G, torch.tensor([0.9]))


@pytest.mark.parametrize(
    ("num_wanted", "expected"),
    [(0, 0.8), (1, 0.8), (2, 0.78), (3, 0.72), (4, 0.7), (5, 0.7), (6, 0.7)],
)
def test_adaptive_threshold_is_the_value_at_the_wanted_rank_clamped(num_wanted, expected):
    # Descending: 0.95 0.85 0.78 0.72 0.6 0.1; rank 0 and 1 are clamped down to 0.8, rank 4 and beyond up to 0.7.
    values_GHW = torch.tensor([[[0.1, 0.78, 0.95], [0.72, 0.85, 0.6]]])
    threshold_G = adaptive_threshold(values_GHW, torch.tensor([num_wanted]), (0.7, 0.8))
    torch.testing.assert_close(threshold_G, torch.tensor([expected]))
    if expected not in (0.7, 0.8):
        assert (values_GHW > threshold_G).sum() == num_wanted


def test_equal_limits_give_a_fixed_threshold():
    threshold_G = adaptive_threshold(torch.rand(5, 8, 8), torch.arange(5), (0.75, 0.75))
    assert torch.equal(threshold_G, torch.full((5,), 0.75))


def test_equals_the_full_sort_reference_on_many_instances():
    semantic_GHW, instance_GHW = torch.rand(40, 12, 10) ** 0.5, torch.rand(40, 12, 10) ** 0.3
    corner_G2 = torch.rand(40, 2) * 20
    boxes_G4 = torch.cat([corner_G2, corner_G2 + 1 + torch.rand(40, 2) * 25], 1)
    masks = self_correction(semantic_GHW, instance_GHW, boxes_G4, stride=4.0)
    inside_GHW = box_masks(boxes_G4, 12, 10, 4.0)
    thresholds = []
    for g in range(40):
        corrected, foreground, trusted, threshold = reference.self_correction(
            semantic_GHW[g].numpy(), instance_GHW[g].numpy(), inside_GHW[g].numpy()
        )
        thresholds.append(threshold)
        torch.testing.assert_close(masks.probabilities_GHW[g], torch.from_numpy(corrected).float())
        assert (masks.target_GHW[g].numpy() == foreground).all()
        assert (masks.trusted_GHW[g].numpy() == trusted).all()
        expected_score = corrected[foreground].mean() if foreground.any() else 0.0
        assert float(masks.scores_G[g]) == pytest.approx(float(expected_score), abs=1e-5)
    assert sum(0.7 < threshold < 0.8 for threshold in thresholds) > 5  # the interesting case is in the sample


def test_equals_the_dense_form_bit_by_bit():
    semantic_GHW, instance_GHW = torch.rand(30, 12, 10) ** 0.5, torch.rand(30, 12, 10) ** 0.3
    semantic_GHW[torch.rand(30, 12, 10) > 0.99] = float("nan")
    corner_G2 = torch.rand(30, 2) * 20
    boxes_G4 = torch.cat([corner_G2, corner_G2 + 1 + torch.rand(30, 2) * 25], 1)
    has_positives_G, ready_G = torch.rand(30) > 0.2, torch.rand(30) > 0.2
    masks = self_correction(
        semantic_GHW, instance_GHW, boxes_G4, stride=4.0, semantic_ready_G=ready_G, has_positives_G=has_positives_G
    )
    inside_GHW = box_masks(boxes_G4, 12, 10, 4.0)
    alpha_G11 = torch.where(ready_G, 0.5, 1.0)[:, None, None]
    corrected_GHW = torch.lerp(semantic_GHW, instance_GHW, alpha_G11).masked_fill(~inside_GHW, 0.0)
    num_confident_G = ((instance_GHW > 0.7) & inside_GHW).sum((1, 2))
    threshold_G = adaptive_threshold(corrected_GHW, num_confident_G, (0.7, 0.8))
    foreground_GHW = corrected_GHW > threshold_G[:, None, None]
    has_positives_G11 = has_positives_G[:, None, None]
    target_GHW = foreground_GHW & has_positives_G11
    assert torch.equal(masks.probabilities_GHW, corrected_GHW.nan_to_num(0.0))
    assert torch.equal(masks.target_GHW, target_GHW)
    assert torch.equal(masks.trusted_GHW, (foreground_GHW | (corrected_GHW < 0.4)) & has_positives_G11)
    size_G = target_GHW.sum((1, 2)).clamp(min=1)
    sum_G = torch.where(target_GHW, corrected_GHW, 0.0).double().sum((1, 2))  # in float64: the same in any order
    assert torch.equal(masks.scores_G, (sum_G / size_G).float())


def test_half_precision_maps_and_autocast_give_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = self_correction(torch.rand(2, 4, 4).half(), torch.rand(2, 4, 4).half(), FULL_BOX.expand(2, 4), stride=4)
    assert masks.probabilities_GHW.dtype == masks.scores_G.dtype == torch.float32


def test_no_instances():
    none_GHW = torch.zeros(0, 4, 4)
    masks = self_correction(none_GHW, none_GHW, torch.zeros(0, 4), stride=4.0)
    assert masks.target_GHW.shape == (0, 4, 4) and masks.scores_G.shape == (0,)


def test_one_pixel_box_has_one_cell_inside():
    masks = self_correction(torch.ones(1, 4, 4), torch.ones(1, 4, 4), torch.tensor([[5.0, 9.0, 6.0, 10.0]]), stride=4.0)
    assert masks.target_GHW.nonzero().tolist() == [[0, 2, 1]] and masks.trusted_GHW.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 1.5}, "alpha"), ({"low": 0.75}, "thresholds"), ({"high_range": (0.8, 0.7)}, "thresholds")],
)
def test_wrong_arguments_say_what_came(options, message):
    with pytest.raises(ValueError, match=message):
        self_correction(torch.rand(1, 2, 2), torch.rand(1, 2, 2), FULL_BOX, stride=4.0, **options)
    with pytest.raises(ValueError, match="semantic map"):
        self_correction(torch.rand(1, 2, 2), torch.rand(2, 2, 2), FULL_BOX, stride=4.0)


def test_adaptive_threshold_of_no_instance_is_empty():
    threshold = adaptive_threshold(torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.long), (0.7, 0.8))
    assert threshold.shape == (0,)
