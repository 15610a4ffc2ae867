"""The Triton kernels of deformable attention against the stock function: on CUDA, or on CPU tensors in triton's interpreter, in
which the last test of this file runs the others; and who is chosen where."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention as stock

from sim_hf.models.sim import deformable_attention, deformable_attention_triton

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IN_INTERPRETER else "cpu"
with_kernels = pytest.mark.skipif(
    not deformable_attention_triton.is_installed() or not (IN_INTERPRETER or torch.cuda.is_available()),
    reason="triton's kernels need CUDA or its interpreter",
)
CASES = {  # batch, heads, channels, queries, points, levels
    "usual": (2, 2, 8, 10, 4, [(3, 5), (6, 9), (11, 18)]),
    "levels of one cell and one row": (1, 3, 4, 30, 2, [(1, 1), (1, 4), (5, 2)]),
    "odd channels, several blocks, one level": (1, 2, 33, 20, 2, [(4, 4)]),
}


def problem(name, dtype=torch.float32, margin=1.0):
    """value, locations (some of them outside) and weights, which want gradients, the levels, and a gradient of the sums."""
    batch, heads, channels, queries, points, shapes = CASES[name]
    cells = sum(height * width for height, width in shapes)
    value = torch.randn(batch, cells, heads, channels, device=DEVICE).to(dtype).requires_grad_()
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, device=DEVICE) * (1 + 2 * margin) - margin
    weights = torch.randn(batch, queries, heads, len(shapes), points, device=DEVICE)
    direction = torch.randn(batch, queries, heads * channels, device=DEVICE).to(dtype)
    return value, locations.requires_grad_(), weights.requires_grad_(), shapes, direction


def value_and_gradients(attend, value, locations, weights, shapes, direction):
    sums = attend(value, shapes, locations, weights)
    return [sums.detach(), *torch.autograd.grad(sums, (value, locations, weights), direction.to(sums.dtype).view_as(sums))]


@with_kernels
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_stock_ones(name):
    inputs = problem(name)
    ours = value_and_gradients(deformable_attention_triton.triton_attention, *inputs)
    theirs = value_and_gradients(stock, *inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.view_as(mine), atol=1e-4, rtol=1e-4)


@with_kernels
def test_values_and_gradients_are_those_of_float64():
    value, locations, weights, shapes, direction = problem("usual", margin=0.2)
    ours = value_and_gradients(deformable_attention_triton.triton_attention, value, locations, weights, shapes, direction)
    exact = [x.detach().double().requires_grad_() for x in (value, locations, weights)]
    for mine, other in zip(ours, value_and_gradients(stock, *exact, shapes, direction), strict=True):
        assert (mine.double() - other.view_as(mine)).norm() < 1e-5 * other.norm()


@with_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once_at_the_end(dtype):
    value, locations, weights, shapes, direction = problem("usual", dtype)
    ours = value_and_gradients(deformable_attention_triton.triton_attention, value, locations, weights, shapes, direction)
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32, torch.float32]
    wide = value.detach().float().requires_grad_()
    sums, of_value, of_locations, of_weights = value_and_gradients(stock, wide, locations, weights, shapes, direction)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0].flatten(2).float(), sums, atol=1e-4, rtol=precision)
    torch.testing.assert_close(ours[1].float(), of_value, atol=1e-4, rtol=precision)
    torch.testing.assert_close(ours[2:], [of_locations, of_weights], atol=1e-3, rtol=1e-4)


@with_kernels
def test_points_on_cell_centres_have_the_stock_gradient_of_the_location():
    shapes, centres = [(4, 4), (8, 8)], (torch.arange(8, device=DEVICE) + 0.5) / 8
    locations = torch.cartesian_prod(centres, centres).view(1, 64, 1, 1, 1, 2).repeat(1, 1, 2, 2, 1, 1).requires_grad_()
    value, weights = torch.randn(1, 80, 2, 4, device=DEVICE), torch.rand(1, 64, 2, 2, 1, device=DEVICE)
    gradients = [
        torch.autograd.grad(attend(value, shapes, locations, weights).square().sum(), locations)[0]
        for attend in (deformable_attention_triton.triton_attention, stock)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@with_kernels
def test_nothing_is_read_far_outside_and_nan_stays_nan():
    value, weights = torch.ones(1, 4, 1, 2, device=DEVICE), torch.ones(1, 3, 1, 1, 1, device=DEVICE)
    locations = torch.tensor([1e30, -1e30, float("nan")], device=DEVICE).view(1, 3, 1, 1, 1, 1).repeat(1, 1, 1, 1, 1, 2)
    with torch.inference_mode():
        sums = deformable_attention_triton.triton_attention(value, [(2, 2)], locations, weights)
    assert sums[0, :2].eq(0).all() and sums[0, 2].isnan().all()


@with_kernels
def test_the_trial_before_the_first_use_succeeds_and_draws_no_random_number():
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "deformable attention goes on")
        assert deformable_attention._triton_was_tried(torch.device(DEVICE), torch.bfloat16, 16, 4)
    assert torch.get_rng_state().equal(before)


def broken(*arguments):
    raise RuntimeError("no compiler\nat all")


def wrong(value, shapes, locations, weights):
    return deformable_attention._by_bags(value, shapes, locations, 1.1 * weights)


@pytest.mark.parametrize(("kernel", "reason"), [(broken, "RuntimeError: no compiler$"), (wrong, "differ from the plain ones by")])
def test_a_kernel_that_fails_or_errs_is_left_out_with_a_warning(kernel, reason, monkeypatch):
    monkeypatch.setitem(deformable_attention.FORMS, "triton", kernel)
    deformable_attention._triton_was_tried.cache_clear()
    with pytest.warns(UserWarning, match=f"goes on without its Triton kernel on cpu in torch.float32: .*{reason}"):
        assert not deformable_attention._triton_was_tried(torch.device("cpu"), torch.float32, 4, 2)
    deformable_attention._triton_was_tried.cache_clear()


def test_a_kernel_that_agrees_is_taken(monkeypatch):
    monkeypatch.setitem(deformable_attention.FORMS, "triton", deformable_attention._by_bags)
    monkeypatch.setattr(deformable_attention, "is_installed", lambda: True)
    deformable_attention._triton_was_tried.cache_clear()
    arguments = (torch.device("cpu"), torch.float32, 4, 2)
    assert deformable_attention._triton_works(*arguments)
    deformable_attention._triton_was_tried.cache_clear()
    assert not deformable_attention._triton_works(torch.device("cpu"), torch.float64, 4, 2)


def test_on_a_cpu_the_bags_are_taken_and_on_cuda_the_kernel_or_samples_unless_results_must_repeat(monkeypatch):
    assert deformable_attention._form_for(torch.zeros(1, 4, 1, 2), 4) == "bags"
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 4, 1, 2))
    for works, form in ((True, "triton"), (False, "grid_sample")):
        monkeypatch.setattr(deformable_attention, "_triton_works", lambda *_, works=works: works)
        assert deformable_attention._form_for(on_cuda, 4) == form
    torch.use_deterministic_algorithms(True)
    try:
        assert deformable_attention._form_for(on_cuda, 4) == "bags"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", list(deformable_attention.FORMS))
def test_on_cuda_every_form_gives_the_stock_values_and_gradients(form, dtype):
    value, locations, weights, shapes, direction = problem("usual", dtype)
    ours = value_and_gradients(deformable_attention.FORMS[form], value, locations, weights, shapes, direction)
    wide = value.detach().float().requires_grad_()
    theirs = value_and_gradients(stock, wide, locations, weights, shapes, direction)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.float() - other.view_as(mine)).norm() < max(torch.finfo(dtype).eps, 1e-5) * other.norm()


@pytest.mark.gpu
def test_on_cuda_the_kernel_is_chosen():
    assert deformable_attention._form_for(torch.zeros(1, 4, 1, 32, device="cuda"), 4) == "triton"


@pytest.mark.skipif(not deformable_attention_triton.is_installed(), reason="triton is not installed")
@pytest.mark.skipif(IN_INTERPRETER, reason="this is the inner run")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__)), "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
