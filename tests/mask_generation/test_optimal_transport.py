"""Sinkhorn: hand-computed numbers, a float64 reference, and every input that breaks the plain form."""

import math

import numpy as np
import pytest
import references_mask_generation as reference
import torch

from sim_hf.mask_generation import sinkhorn_assignment

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_one_iteration_by_hand():
    # exp(S / eps) = [[4, 1], [1, 1]]; columns / their sums = [[4/5, 1/2], [1/5, 1/2]]; rows / their sums:
    similarity_KML = 0.05 * torch.tensor([[[math.log(4), 0.0], [0.0, 0.0]]])
    assignment_KML = sinkhorn_assignment(similarity_KML, num_iterations=1)
    torch.testing.assert_close(assignment_KML, torch.tensor([[[8 / 13, 5 / 13], [2 / 7, 5 / 7]]]))


def test_no_iteration_is_the_softmax_over_prototypes():
    similarity_KML = torch.randn(2, 5, 3)
    assignment_KML = sinkhorn_assignment(similarity_KML, epsilon=0.5, num_iterations=0)
    torch.testing.assert_close(assignment_KML, (similarity_KML / 0.5).softmax(-1))


def test_all_equal_similarities_spread_evenly():
    torch.testing.assert_close(sinkhorn_assignment(torch.ones(1, 7, 4)), torch.full((1, 7, 4), 0.25))


def test_many_iterations_give_every_prototype_its_equal_share():
    assignment_KML = sinkhorn_assignment(torch.rand(2, 60, 5), num_iterations=300)
    torch.testing.assert_close(assignment_KML.sum(1), torch.full((2, 5), 12.0), rtol=1e-3, atol=0)


def test_given_marginal_is_followed_at_any_scale():
    marginal_KL = torch.tensor([[6.0, 3.0, 1.0]])
    assignment_KML = sinkhorn_assignment(torch.rand(1, 40, 3), num_iterations=300, prototype_marginal_KL=marginal_KL)
    torch.testing.assert_close(assignment_KML.sum(1), torch.tensor([[24.0, 12.0, 4.0]]), rtol=1e-3, atol=0)


def test_prototype_with_zero_marginal_gets_nothing_and_an_all_zero_marginal_means_uniform():
    similarity_KML = torch.rand(2, 6, 3)
    marginal_KL = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assignment_KML = sinkhorn_assignment(similarity_KML, prototype_marginal_KL=marginal_KL)
    assert (assignment_KML[0, :, 0] == 0).all()
    torch.testing.assert_close(assignment_KML.sum(-1), torch.ones(2, 6))
    torch.testing.assert_close(assignment_KML[1], sinkhorn_assignment(similarity_KML)[1])


@pytest.mark.parametrize("num_pixels", [0, 1, 2, 500, 100_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_float64_reference(dtype, num_pixels):
    similarity_KML = (torch.rand(1, num_pixels, 10) * 2 - 1).to(dtype)
    assignment_KML = sinkhorn_assignment(similarity_KML)
    assert assignment_KML.dtype == torch.float32 and assignment_KML.shape == similarity_KML.shape
    if num_pixels:
        expected = torch.from_numpy(reference.sinkhorn(similarity_KML[0].double().numpy()))
        torch.testing.assert_close(assignment_KML[0].double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "similarity_ML",
    [
        torch.ones(6, 10),
        -torch.ones(6, 10),
        torch.eye(10)[:6] * 2 - 1,
        torch.linspace(-300, 300, 60).reshape(6, 10),
        torch.linspace(-6e4, 6e4, 60).reshape(6, 10),
        torch.zeros(6, 10),
    ],
    ids=["all +1", "all -1", "+-1", "un-normalised", "near the fp16 maximum", "zero"],
)
def test_hard_inputs_stay_finite_with_rows_that_sum_to_one(similarity_ML, dtype):
    assignment_KML = sinkhorn_assignment(similarity_ML[None].to(dtype))
    assert assignment_KML.isfinite().all()
    torch.testing.assert_close(assignment_KML.sum(-1), torch.ones(1, 6))
    expected = torch.from_numpy(reference.sinkhorn(similarity_ML.to(dtype).double().numpy()))
    if similarity_ML.abs().max() <= 1:
        torch.testing.assert_close(assignment_KML[0].double(), expected, rtol=0, atol=5e-6)


def test_float32_maximum_stays_finite():
    largest = torch.finfo(torch.float32).max
    assignment_KML = sinkhorn_assignment(torch.tensor([[[largest, -largest], [0.5, 0.1]]]))
    torch.testing.assert_close(assignment_KML.sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_pixel_is_masked_and_changes_no_other(bad):
    similarity_KML = torch.rand(1, 5, 4)
    expected_KML = sinkhorn_assignment(similarity_KML[:, :4])
    similarity_KML[0, 4, 2] = bad
    assignment_KML = sinkhorn_assignment(similarity_KML)
    assert (assignment_KML[0, 4] == 0).all()
    torch.testing.assert_close(assignment_KML[:, :4], expected_KML)


def test_padding_of_a_batched_class_changes_nothing():
    similarity_KML = torch.rand(3, 8, 4)
    sizes = [8, 3, 0]
    valid_KM = torch.arange(8) < torch.tensor(sizes)[:, None]
    assignment_KML = sinkhorn_assignment(similarity_KML, valid_KM)
    assert (assignment_KML[~valid_KM] == 0).all()
    for k, size in enumerate(sizes):
        alone_ML = sinkhorn_assignment(similarity_KML[k : k + 1, :size])[0]
        torch.testing.assert_close(assignment_KML[k, :size], alone_ML)


def test_autocast_changes_nothing():
    similarity_KML = torch.rand(2, 50, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assignment_KML = sinkhorn_assignment(similarity_KML)
    assert torch.equal(assignment_KML, sinkhorn_assignment(similarity_KML))


def test_no_gradient_flows():
    assert not sinkhorn_assignment(torch.rand(1, 3, 2, requires_grad=True)).requires_grad


def test_result_does_not_depend_on_pixel_order():
    similarity_KML = torch.rand(1, 40, 6)
    order = torch.from_numpy(np.random.default_rng(0).permutation(40))
    torch.testing.assert_close(sinkhorn_assignment(similarity_KML[:, order]), sinkhorn_assignment(similarity_KML)[:, order])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity_KML": torch.rand(3, 2)}, "similarity must be"),
        ({"similarity_KML": torch.rand(1, 3, 0)}, "similarity must be"),
        ({"similarity_KML": torch.rand(1, 3, 2), "valid_KM": torch.ones(1, 2, dtype=torch.bool)}, "valid must be"),
        ({"similarity_KML": torch.rand(1, 3, 2), "valid_KM": torch.ones(1, 3)}, "valid must be bool"),
        ({"similarity_KML": torch.rand(1, 3, 2), "epsilon": 0.0}, "epsilon must be positive"),
        ({"similarity_KML": torch.rand(1, 3, 2), "num_iterations": -1}, "num_iterations"),
        ({"similarity_KML": torch.rand(1, 3, 2), "prototype_marginal_KL": torch.ones(1, 3)}, "prototype_marginal"),
    ],
)
def test_wrong_arguments_say_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_assignment(**arguments)
