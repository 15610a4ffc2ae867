"""CondInst's dynamic mask head against the equation, with the coordinate maps made."""

import pytest
import torch

from sim_hf.models.condinst.dynamic_mask_head import dynamic_masks, num_parameters, split_parameters


def masks_by_the_equation(maps_BCHW, controllers_NP, image_ids_N, locations_N2, scales_N, stride, hidden=8):
    """One instance and one pixel at a time: relu(W1 [x_n - x, y_n - y, F] + b1), relu(W2 . + b2), w3 . + b3."""
    channels, height, width = maps_BCHW.shape[1:]
    masks = torch.zeros(len(controllers_NP), height, width, dtype=maps_BCHW.dtype)
    for n, row in enumerate(controllers_NP):
        sizes = [hidden * (channels + 2), hidden * hidden, hidden, hidden, hidden, 1]
        w1, w2, w3, b1, b2, b3 = row.split(sizes)
        for i in range(height):
            for j in range(width):
                pixel = torch.tensor([(j + 0.5) * stride, (i + 0.5) * stride], dtype=maps_BCHW.dtype)
                relative = (locations_N2[n] - pixel) / scales_N[n]
                x = torch.cat([relative, maps_BCHW[image_ids_N[n], :, i, j]])
                x = (w1.view(hidden, -1) @ x + b1).relu()
                x = (w2.view(hidden, hidden) @ x + b2).relu()
                masks[n, i, j] = w3 @ x + b3[0]
    return masks


def example(num=5, channels=3, hidden=8, height=4, width=6):
    generator = torch.Generator().manual_seed(1)
    return {
        "maps": torch.randn(3, channels, height, width, generator=generator),
        "controllers": torch.randn(num, num_parameters(channels, hidden), generator=generator),
        "image_ids": torch.tensor([0, 0, 2, 2, 2])[:num],
        "locations": torch.rand(num, 2, generator=generator) * 40,
        "scales": torch.tensor([16.0, 32.0, 16.0, 64.0, 32.0])[:num],
    }


@pytest.mark.parametrize(("channels", "hidden", "expected"), [(8, 8, 169), (16, 16, 593)])
def test_a_controller_has_the_numbers_of_public_checkpoints(channels, hidden, expected):
    assert num_parameters(channels, hidden) == expected


def test_the_head_equals_the_equation_with_coordinate_maps_for_each_instance():
    given = example()
    masks = dynamic_masks(*given.values(), stride=8)
    torch.testing.assert_close(masks, masks_by_the_equation(*given.values(), stride=8), atol=1e-4, rtol=1e-4)


def test_controllers_are_parsed_weights_first_then_biases_coordinates_before_features():
    controllers = torch.arange(169.0)[None]
    (w1, w2, w3), (b1, b2, b3) = split_parameters(controllers, 8)
    assert w1.shape == (1, 8, 10) and w1[0, 0].tolist() == list(range(10)) and w1[0, 7, 9] == 79
    assert w2.shape == (1, 8, 8) and w2[0, 0, 0] == 80 and w2[0, 7, 7] == 143
    assert w3[0].tolist() == [list(range(144, 152))]
    assert b1[0].tolist() == list(range(152, 160)) and b2[0].tolist() == list(range(160, 168)) and b3[0].tolist() == [168]


def test_numbers_that_are_of_no_mask_head_are_refused():
    with pytest.raises(ValueError, match="no mask head on 8 channels has 170 numbers"):
        split_parameters(torch.zeros(1, 170), 8)


def test_chunks_of_instances_change_nothing(monkeypatch):
    given = example()
    whole = dynamic_masks(*given.values(), stride=8)
    monkeypatch.setattr("sim_hf.models.condinst.dynamic_mask_head._CELLS_AT_A_TIME", 8 * 4 * 6 * 2)
    torch.testing.assert_close(dynamic_masks(*given.values(), stride=8), whole, atol=1e-5, rtol=1e-5)


def test_gradients_are_right():
    given = {
        name: x.double() if x.is_floating_point() else x for name, x in example(num=2, channels=1, height=2, width=2).items()
    }
    maps, controllers = given["maps"].requires_grad_(), given["controllers"].requires_grad_()
    ours = dynamic_masks(*given.values(), stride=8)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weight).sum(), (maps, controllers))
    slow = masks_by_the_equation(*given.values(), stride=8)
    expected = torch.autograd.grad((slow * weight).sum(), (maps, controllers))
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_no_instance_gives_no_mask_and_a_gradient_of_zero():
    given = example()
    maps, controllers = given["maps"].requires_grad_(), given["controllers"].requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    masks = dynamic_masks(maps, controllers[none], none, torch.zeros(0, 2), torch.zeros(0), stride=8)
    assert masks.shape == (0, 4, 6)
    masks.sum().backward()
    assert controllers.grad.abs().sum() == 0 and maps.grad.abs().sum() == 0


def test_autocast_does_not_reach_the_coordinates():
    given = example()
    given["locations"] += 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = dynamic_masks(*given.values(), stride=8)
    assert masks.dtype == torch.float32
    torch.testing.assert_close(masks, dynamic_masks(*given.values(), stride=8))
