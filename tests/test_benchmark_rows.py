"""The published form that the benchmark measures against gives what the package gives: value and gradient, at a small size."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    """A benchmark module by its path; under its own name, by which the others import it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


load("measuring")
plain = load("plain_supervision")
supervision_inputs = load("supervision_inputs")
speed_supervision = load("speed_supervision")

PARTS = ("pairwise", "projection", "color", "prototypes", "semantic", "pseudo_masks")


@pytest.fixture(scope="module")
def sides():
    """A 24x40 grid, two smooth pictures, five instances of three classes, two decoder layers."""
    generator = torch.Generator().manual_seed(0)
    coarse_B3hw = torch.rand(2, 3, 6, 10, generator=generator)
    images_B3HW = torch.nn.functional.interpolate(coarse_B3hw, (96, 160), mode="bilinear", align_corners=False)
    pictures = [
        supervision_inputs.Picture(
            images_B3HW[0],
            torch.tensor([[10.5, 8.5, 90.5, 70.5], [60.5, 30.5, 160.0, 96.0], [100.5, 4.5, 102.5, 7.5]]),
            torch.tensor([0, 2, 1]),
        ),
        supervision_inputs.Picture(
            images_B3HW[1], torch.tensor([[0.0, 0.0, 50.5, 60.5], [81.5, 11.5, 130.5, 90.5]]), torch.tensor([2, 2])
        ),
    ]
    return speed_supervision.Sides(supervision_inputs.make_inputs(pictures, 3, num_instances=5, num_layers=2))


def part_of(side, name):
    return {
        "pairwise": side.pairwise,
        "projection": side.projection,
        "color": side.color,
        "prototypes": side.prototypes,
        "semantic": side.semantic,
        "pseudo_masks": side.pseudo_masks,
    }[name]()


@pytest.mark.parametrize("name", PARTS)
def test_ours_equals_the_published_form(sides, name):
    ours, theirs = part_of(sides.ours, name), part_of(sides.plain, name)
    assert ours.keys() == theirs.keys()
    for key in ours:
        if ours[key].dtype == torch.bool:
            assert torch.equal(ours[key], theirs[key]), key
        else:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert speed_supervision.agree(ours, theirs)


def test_the_whole_chain_equals_the_published_form(sides):
    assert speed_supervision.agree(sides.ours.everything(), sides.plain.everything(), by_length=True)


def test_pseudo_masks_do_not_depend_on_the_chunks(sides):
    at_once = sides.ours.chunked_masks(5)
    for chunk_size in (1, 2):
        assert speed_supervision.agree(sides.ours.chunked_masks(chunk_size), at_once)


@pytest.mark.parametrize("name", ("pairwise", "projection"))
def test_the_compared_gradients_are_not_zero(sides, name):
    result = part_of(sides.plain, name)
    assert all(result[f"gradient of layer {layer}"].abs().sum() > 0 for layer in range(2))


def test_the_compared_masks_have_foreground_background_and_ignored_pixels(sides):
    masks = sides.plain.pseudo_masks()
    assert masks["target"].any() and (masks["trusted"] & ~masks["target"]).any() and (~masks["trusted"]).any()


def test_the_compared_prototypes_moved(sides):
    moved_KLC = sides.plain.prototypes()["prototypes"]
    assert (moved_KLC - sides.plain.inputs.prototypes_KLC).abs().amax() > 1e-4


def test_the_plain_boxes_are_the_cells_whose_centre_lies_in_the_box():
    bitmasks_GHW = plain.box_bitmasks(torch.tensor([[1.5, 2.5, 5.5, 11.5], [4.5, 4.5, 5.5, 5.5]]), (12, 8), 4)
    assert bitmasks_GHW.tolist() == [[[0, 0], [1, 0], [1, 0]], [[0, 0], [0, 1], [0, 0]]]


def test_agreement_allows_no_wrong_gradient_and_no_more_exceptions_than_stated():
    value = {"x": torch.linspace(1, 2, 100)}
    assert speed_supervision.agree(value, {"x": value["x"] * (1 + 1e-5)})
    assert not speed_supervision.agree(value, {"x": value["x"] * (1 + 1e-3)})
    assert not speed_supervision.agree(value, {"x": value["x"] * float("nan")})
    assert not speed_supervision.agree(value, {"y": value["x"]})
    many = {"x": torch.ones(100_000)}
    one_off = {"x": many["x"].clone()}
    one_off["x"][0] = 1.005
    assert speed_supervision.agree(many, one_off)
    one_off["x"][0] = 1.05
    assert not speed_supervision.agree(many, one_off)
    mask = torch.zeros(100_000, dtype=torch.bool)
    flipped = mask.clone()
    flipped[:1] = True
    assert speed_supervision.agree({"m": mask}, {"m": flipped})
    flipped[:2] = True
    assert not speed_supervision.agree({"m": mask}, {"m": flipped})
