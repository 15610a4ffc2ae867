"""Eq. 6: the weights of an instance's positives and the map they make."""

import math

import pytest
import references_mask_generation as reference
import torch

from sim_hf.mask_generation import instance_probability_map, positive_mask_weights, predicted_boxes
from sim_hf.structures import mask_boxes

BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def test_predicted_box_is_the_tight_box_of_the_mask_in_input_pixels():
    mask_logits_NHW = torch.full((2, 6, 8), -1.0)
    mask_logits_NHW[0, 2:4, 3:7] = 1.0
    expected_N4 = torch.tensor([[12.0, 8.0, 28.0, 16.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(predicted_boxes(mask_logits_NHW, 4.0), expected_N4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_predicted_boxes_equal_those_of_the_masks(dtype):
    mask_logits_NHW = (torch.randn(40, 6, 8) - torch.rand(40, 1, 1) * 4).to(dtype)
    assert torch.equal(predicted_boxes(mask_logits_NHW, 4.0), mask_boxes(mask_logits_NHW > 0, 4.0))
    assert predicted_boxes(mask_logits_NHW[:0], 4.0).shape == (0, 4)


def test_weights_by_hand():
    predicted_N4 = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [20.0, 20.0, 30.0, 30.0]])  # IoU 1, 1/2, 0
    weights_N = positive_mask_weights(predicted_N4, BOX, torch.tensor([0, 0, 0]), mu=2.0)
    total = math.exp(2) + math.exp(1) + 1
    torch.testing.assert_close(weights_N, torch.tensor([math.exp(2) / total, math.exp(1) / total, 1 / total]))


def test_single_positive_has_weight_one_however_bad_its_box():
    assert positive_mask_weights(torch.zeros(1, 4), BOX, torch.tensor([0])).tolist() == [1.0]


def test_weights_equal_the_reference_with_interleaved_instances():
    corner_N2 = torch.rand(30, 2) * 20
    predicted_N4 = torch.cat([corner_N2, corner_N2 + 5 + torch.rand(30, 2) * 20], 1)
    boxes_G4 = torch.tensor([[0.0, 0.0, 20.0, 20.0], [10.0, 5.0, 40.0, 30.0], [5.0, 5.0, 9.0, 9.0]])
    instance_ids_N = torch.randint(0, 3, (30,))
    weights_N = positive_mask_weights(predicted_N4, boxes_G4, instance_ids_N)
    expected = reference.positive_weights(predicted_N4.tolist(), boxes_G4.tolist(), instance_ids_N.tolist())
    torch.testing.assert_close(weights_N, torch.tensor(expected))


def test_huge_mu_stays_finite_and_picks_the_best_box():
    predicted_N4 = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 10.0]])
    assert positive_mask_weights(predicted_N4, BOX, torch.tensor([0, 0]), mu=1e6).tolist() == [0.0, 1.0]


def test_map_by_hand():
    mask_logits_NHW = torch.tensor([0.0, math.log(3), -math.log(3)])[:, None, None].expand(3, 2, 2)  # 0.5, 0.75, 0.25
    map_GHW = instance_probability_map(mask_logits_NHW, torch.tensor([0.2, 0.8, 1.0]), torch.tensor([1, 1, 0]), 3)
    torch.testing.assert_close(map_GHW[:, 0, 0], torch.tensor([0.25, 0.7, 0.0]))


def test_instance_without_positives_is_zero_everywhere():
    map_GHW = instance_probability_map(torch.ones(1, 3, 3), torch.ones(1), torch.tensor([1]), 2)
    assert (map_GHW[0] == 0).all() and (map_GHW[1] > 0.7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_map_equals_the_reference(dtype):
    mask_logits_NHW = (torch.randn(12, 5, 7) * 8).to(dtype)
    instance_ids_N = torch.randint(0, 4, (12,))
    weights_N = torch.rand(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        map_GHW = instance_probability_map(mask_logits_NHW, weights_N, instance_ids_N, 4)
    expected = reference.instance_map(mask_logits_NHW.float().numpy(), weights_N.tolist(), instance_ids_N.tolist(), 4)
    assert map_GHW.dtype == torch.float32
    torch.testing.assert_close(map_GHW.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_logits_of_the_caller_are_not_changed():
    mask_logits_NHW = torch.randn(2, 3, 3)
    before = mask_logits_NHW.clone()
    instance_probability_map(mask_logits_NHW, torch.ones(2), torch.tensor([0, 1]), 2)
    assert torch.equal(mask_logits_NHW, before)


def test_no_positives_and_no_instances():
    none = torch.zeros(0, dtype=torch.long)
    assert positive_mask_weights(torch.zeros(0, 4), torch.zeros(0, 4), none).shape == (0,)
    assert instance_probability_map(torch.zeros(0, 4, 5), torch.zeros(0), none, 0).shape == (0, 4, 5)
    assert instance_probability_map(torch.zeros(0, 4, 5), torch.zeros(0), none, 2).sum() == 0


def test_wrong_shapes_say_what_came():
    with pytest.raises(ValueError, match=r"\(2, 4\), got \(1, 4\)"):
        positive_mask_weights(torch.zeros(1, 4), BOX, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="expected 2 masks"):
        instance_probability_map(torch.zeros(1, 3, 3), torch.zeros(1), torch.tensor([0, 0]), 1)
