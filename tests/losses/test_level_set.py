import math

import pytest
import references_box_losses as reference
import torch

from sim_hf.losses import color_affinity, local_consistency_loss, region_energy, unit_features
from sim_hf.structures import box_masks

HEIGHT, WIDTH, STRIDE = 6, 7, 4
IDS = torch.tensor([0, 1, 1])


def inside_of_boxes():
    """A usual box, one of one cell, and the whole grid."""
    boxes = torch.tensor([[4.0, 4.0, 20.0, 24.0], [13.0, 13.0, 14.0, 14.0], [0.0, 0.0, 28.0, 24.0]])
    return box_masks(boxes, HEIGHT, WIDTH, STRIDE)


def colors_and_valid():
    valid = torch.ones(2, HEIGHT, WIDTH, dtype=torch.bool)
    valid[1, :, 5:] = False
    return torch.rand(2, 3, HEIGHT, WIDTH), valid


def test_energy_is_zero_when_the_mask_holds_one_colour_and_the_rest_another():
    maps = torch.zeros(1, 3, 4, 4)
    maps[:, :, :, :2] = torch.tensor([0.2, 0.9, 0.4])[:, None, None]
    logits = torch.where(maps[:, 0] > 0, 40.0, -40.0)
    inside = torch.ones(1, 4, 4, dtype=torch.bool)
    assert region_energy(logits, inside, maps, torch.zeros(1, dtype=torch.long)).item() == pytest.approx(0, abs=1e-6)
    gray = region_energy(torch.zeros(1, 4, 4), inside, maps, torch.zeros(1, dtype=torch.long)).item()
    # Every cell is half its value away from the mean: (0.1^2 + 0.45^2 + 0.2^2)
    assert gray == pytest.approx(0.01 + 0.2025 + 0.04, rel=1e-5)


def test_energy_of_a_hand_computed_mask():
    # One row of four cells with values 0, 1, 2, 9; the last is outside of the box. p = 3/4, 1/4, 1/2.
    logits = torch.tensor([[[math.log(3), -math.log(3), 0.0, 5.0]]])
    inside = torch.tensor([[[True, True, True, False]]])
    maps = torch.tensor([[[[0.0, 1.0, 2.0, 9.0]]]])
    # c1 = (0.25 + 1) / 1.5 = 5/6, c2 = (0.75 + 1) / 1.5 = 7/6
    first = 0.75 * (5 / 6) ** 2 + 0.25 * (1 / 6) ** 2 + 0.5 * (7 / 6) ** 2
    second = 0.25 * (7 / 6) ** 2 + 0.75 * (1 / 6) ** 2 + 0.5 * (5 / 6) ** 2
    result = region_energy(logits, inside, maps, torch.zeros(1, dtype=torch.long))
    assert result.item() == pytest.approx((first + second) / 3, rel=1e-6)


def test_energy_equals_the_slow_reference():
    logits, maps, inside = 2 * torch.randn(3, HEIGHT, WIDTH), torch.randn(2, 4, HEIGHT, WIDTH), inside_of_boxes()
    expected = [reference.region_energy(logits[n].tolist(), inside[n].tolist(), maps[IDS[n]].tolist()) for n in range(len(IDS))]
    assert region_energy(logits, inside, maps, IDS).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_energy_of_an_instance_does_not_depend_on_the_others():
    logits, maps, inside = torch.randn(3, HEIGHT, WIDTH), torch.randn(2, 4, HEIGHT, WIDTH), inside_of_boxes()
    together, turned = region_energy(logits, inside, maps, IDS), torch.tensor([2, 0, 1])
    torch.testing.assert_close(region_energy(logits[turned], inside[turned], maps, IDS[turned]), together[turned])
    alone = torch.cat([region_energy(logits[n : n + 1], inside[n : n + 1], maps, IDS[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(alone, together)


def test_energy_keeps_its_number_on_a_map_far_from_zero():
    logits, inside, maps = torch.randn(3, HEIGHT, WIDTH), inside_of_boxes(), torch.randn(2, 4, HEIGHT, WIDTH)
    near, far = (region_energy(logits, inside, maps + shift, IDS) for shift in (0.0, 1000.0))
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)


def test_gradients_are_right():
    """Also that of the energy, whose means are taken without gradient: they are where it is smallest."""
    inside, maps = inside_of_boxes(), torch.randn(2, 4, HEIGHT, WIDTH, dtype=torch.float64)
    colors, valid = colors_and_valid()
    affinity = color_affinity(colors.double(), valid)
    logits = torch.randn(3, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: region_energy(x, inside, maps, IDS), logits)
    assert torch.autograd.gradcheck(lambda x: local_consistency_loss(x, inside, affinity, IDS, num_iterations=3), logits)


def test_affinity_of_hand_computed_colours():
    # One row, dilation 1, one channel. The middle cell 0 has the neighbours 0 and 1: spread sqrt(1/2), alpha 1.
    affinity = color_affinity(torch.tensor([[[[0.0, 0.0, 1.0]]]]), torch.ones(1, 1, 3), dilation=1, alpha=1.0)
    weight = math.exp(-2.0)
    assert affinity[0, :, 0, 1].tolist() == pytest.approx([0, 0, 0, 1 / (1 + weight), 0, weight / (1 + weight), 0, 0, 0])
    assert affinity[0, 5, 0, 0] == 1 and affinity[0, 3, 0, 2] == 1  # the only neighbour, however different


def test_affinity_equals_the_slow_reference():
    colors, valid = colors_and_valid()
    affinity = color_affinity(colors, valid, dilation=2, alpha=0.3)
    for image in range(2):
        table = reference.affinity(colors[image].double().tolist(), valid[image].tolist(), 2, 0.3)
        for (row, column), shares in table.items():
            dense = {
                (row + 2 * down, column + 2 * right): affinity[image, 3 * (down + 1) + right + 1, row, column].item()
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
            }
            assert {cell: value for cell, value in dense.items() if value > 1e-6} == pytest.approx(
                {cell: share for cell, share in shares.items() if share > 1e-6}, abs=1e-4
            )


def test_consistency_equals_the_slow_reference():
    logits, inside = 2 * torch.randn(3, HEIGHT, WIDTH), inside_of_boxes()
    colors, valid = colors_and_valid()
    tables = [reference.affinity(colors[i].double().tolist(), valid[i].tolist(), 2, 0.3) for i in range(2)]
    expected = [reference.local_consistency(logits[n].tolist(), inside[n].tolist(), tables[IDS[n]], 10) for n in range(len(IDS))]
    result = local_consistency_loss(logits, inside, color_affinity(colors, valid), IDS)
    assert result.tolist() == pytest.approx(expected, abs=1e-4)


def test_consistency_is_zero_for_masks_that_follow_the_colours():
    colors = torch.zeros(1, 3, HEIGHT, 8)
    colors[:, :, :, :4] = 1.0
    logits = torch.where(colors[:, 0] > 0, 40.0, -40.0)
    affinity = color_affinity(colors, torch.ones(1, HEIGHT, 8))
    inside, ids = torch.ones(1, HEIGHT, 8, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    assert local_consistency_loss(logits, inside, affinity, ids).item() < 1e-2
    assert local_consistency_loss(logits.roll(1, 2), inside, affinity, ids).item() > 0.1


def test_unit_features_have_length_one_or_zero_at_any_scale():
    for scale in (1e-30, 1.0, 1e30):
        features = scale * torch.randn(1, 5, 2, 3)
        features[0, :, 0, 0] = 0
        lengths = unit_features(features).square().sum(1)
        assert lengths[0, 0, 0] == 0
        torch.testing.assert_close(lengths.flatten()[1:], torch.ones(5))


def test_a_box_without_a_valid_cell_costs_nothing():
    logits = torch.randn(1, HEIGHT, WIDTH, requires_grad=True)
    inside, ids = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    affinity = color_affinity(torch.rand(1, 3, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH))
    loss = region_energy(logits, inside, torch.rand(1, 3, HEIGHT, WIDTH), ids)
    loss = loss + local_consistency_loss(logits, inside, affinity, ids)
    loss.sum().backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_no_instance_gives_an_empty_loss_with_a_gradient_path():
    logits = torch.zeros(0, HEIGHT, WIDTH, requires_grad=True)
    nobody, inside = torch.zeros(0, dtype=torch.long), torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)
    maps = torch.rand(2, 3, HEIGHT, WIDTH)
    affinity = color_affinity(maps, torch.ones(2, HEIGHT, WIDTH))
    for loss in (region_energy(logits, inside, maps, nobody), local_consistency_loss(logits, inside, affinity, nobody)):
        assert loss.shape == (0,) and loss.dtype == torch.float32
        loss.sum().backward()
    assert logits.grad.shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_give_finite_float32_losses_and_gradients(dtype):
    inside, maps = inside_of_boxes(), unit_features(torch.randn(2, 4, HEIGHT, WIDTH))
    affinity = color_affinity(maps[:, :3], torch.ones(2, HEIGHT, WIDTH))
    largest = torch.finfo(dtype).max
    for values in (torch.full((3, HEIGHT, WIDTH), largest), torch.full((3, HEIGHT, WIDTH), -largest)):
        logits = values.to(dtype).requires_grad_()
        loss = region_energy(logits, inside, maps, IDS) + local_consistency_loss(logits, inside, affinity, IDS)
        loss.sum().backward()
        assert loss.dtype == torch.float32 and loss.isfinite().all() and logits.grad.isfinite().all()


def test_autocast_changes_nothing():
    logits, inside, maps = torch.randn(3, HEIGHT, WIDTH), inside_of_boxes(), torch.randn(2, 4, HEIGHT, WIDTH)
    affinity = color_affinity(maps, torch.ones(2, HEIGHT, WIDTH))

    def both():
        return region_energy(logits, inside, maps, IDS), local_consistency_loss(logits, inside, affinity, IDS)

    outside = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(both(), outside, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inside_NHW": torch.ones(1, HEIGHT, WIDTH)}, "inside must have the shape"),
        ({"image_ids_N": torch.tensor([0])}, r"one image id per mask \(3\)"),
        ({"maps_BCHW": torch.rand(2, 3, HEIGHT, 5)}, r"maps must be \(B, C, 6, 7\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    arguments = {
        "mask_logits_NHW": torch.zeros(3, HEIGHT, WIDTH),
        "inside_NHW": inside_of_boxes(),
        "maps_BCHW": torch.rand(2, 3, HEIGHT, WIDTH),
        "image_ids_N": IDS,
    }
    with pytest.raises(ValueError, match=message):
        region_energy(**{**arguments, **change})


def test_wrong_affinities_are_named():
    with pytest.raises(ValueError, match="valid must be"):
        color_affinity(torch.rand(2, 3, 4, 4), torch.ones(2, 4, 5))
    with pytest.raises(ValueError, match="alpha must be positive"):
        color_affinity(torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4), alpha=0)
    with pytest.raises(ValueError, match=r"affinity must be \(B, 9, 6, 7\)"):
        local_consistency_loss(torch.zeros(3, HEIGHT, WIDTH), inside_of_boxes(), torch.rand(2, 8, HEIGHT, WIDTH), IDS)
