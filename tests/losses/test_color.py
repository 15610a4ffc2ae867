import pytest
import references_losses as reference
import torch

from sim_hf.losses import rgb_to_lab


@pytest.mark.parametrize(
    ("name", "rgb", "lab"),
    [  # the usual published values of the sRGB corners, D65
        ("white", (1, 1, 1), (100.0, 0.0, 0.0)),
        ("black", (0, 0, 0), (0.0, 0.0, 0.0)),
        ("red", (1, 0, 0), (53.24, 80.09, 67.20)),
        ("green", (0, 1, 0), (87.73, -86.18, 83.18)),
        ("blue", (0, 0, 1), (32.30, 79.19, -107.86)),
        ("mid grey", (0.5, 0.5, 0.5), (53.39, 0.0, 0.0)),
    ],
)
def test_known_colours(name, rgb, lab):
    got = rgb_to_lab(torch.tensor(rgb, dtype=torch.float32).reshape(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(got, torch.tensor(lab), atol=0.01, rtol=0)


def test_random_and_dark_colours_equal_the_formula():
    images = torch.rand(2, 3, 5, 7)
    images[1] *= 0.05  # both straight pieces of the curves
    expected = [[reference.lab_of_pixel(*pixel) for pixel in image.flatten(1).T.tolist()] for image in images]
    got = rgb_to_lab(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-3, rtol=0)


def test_rounding_outside_0_to_1_is_clamped():
    images = torch.tensor([-0.2, 0.5, 1.1]).reshape(1, 3, 1, 1)
    assert torch.equal(rgb_to_lab(images), rgb_to_lab(images.clamp(0, 1)))


def test_half_precision_images_and_autocast_are_computed_in_float32():
    images = torch.rand(1, 3, 4, 4).half()
    with torch.autocast("cpu", torch.bfloat16):
        got = rgb_to_lab(images)
    assert got.dtype == torch.float32 and torch.equal(got, rgb_to_lab(images.float()))


def test_wrong_layout_is_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 4, 3\)"):
        rgb_to_lab(torch.zeros(1, 4, 4, 3))
