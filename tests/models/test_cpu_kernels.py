"""Convolutions and norms with a backward of their own in bfloat16 on a CPU, against torch's."""

import pytest
import torch
from torch import nn

from sim_hf.models.sim.depthwise_convolution import convolve, has_slow_backward
from sim_hf.models.sim.group_norm import SIMGroupNorm


def channels_last(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def value_and_gradients(call, inputs, direction):
    value = call()
    value.backward(direction.to(value.dtype))
    gradients = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    return value.detach(), gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_strided_depthwise_convolution_has_the_values_and_gradients_of_the_plain_one(bias, autocast):
    convolution = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=bias)
    convolution = convolution if autocast else convolution.bfloat16()
    images = channels_last(3, 6, 11, 8).requires_grad_()
    direction = channels_last(3, 6, 6, 4)
    inputs = [images, *convolution.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert has_slow_backward(convolution, images)
        plain, plain_gradients = value_and_gradients(lambda: convolution(images), inputs, direction)
        ours, gradients = value_and_gradients(
            lambda: convolve(convolution, images, convolution.weight, convolution.bias), inputs, direction
        )
    assert ours.equal(plain) and ours.stride() == plain.stride()
    for mine, theirs in zip(gradients, plain_gradients, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)  # torch rounds sums to bfloat16


def test_gradients_of_the_strided_depthwise_convolution_are_those_of_float32():
    convolution = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
    images, direction = channels_last(2, 4, 9, 9).requires_grad_(), channels_last(2, 4, 5, 5)
    inputs = [images, *convolution.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = value_and_gradients(
            lambda: convolve(convolution, images, convolution.weight, convolution.bias), inputs, direction
        )
    _, exact = value_and_gradients(lambda: convolution(images.float()), inputs, direction)
    torch.testing.assert_close(gradients, exact)


@pytest.mark.parametrize("changed", [{"stride": 1}, {"groups": 1}, {"padding_mode": "reflect"}])
def test_other_convolutions_stay_with_torch(changed):
    convolution = nn.Conv2d(4, 4, 3, **{"stride": 2, "padding": 1, "groups": 4, **changed})
    assert not has_slow_backward(convolution, channels_last(1, 4, 8, 8))


def test_float32_and_inference_stay_with_torch():
    convolution = nn.Conv2d(4, 4, 3, stride=2, groups=4)
    assert not has_slow_backward(convolution, torch.randn(1, 4, 8, 8))
    with torch.no_grad():
        assert not has_slow_backward(convolution, channels_last(1, 4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_has_the_values_and_gradients_of_the_plain_one(dtype):
    ours, plain = SIMGroupNorm(4, 12).to(dtype), nn.GroupNorm(4, 12).to(dtype)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    images, direction = (channels_last(3, 12, 5, 7) * 3 + 1).requires_grad_(), channels_last(3, 12, 5, 7)
    images = images.detach().requires_grad_()
    value, gradients = value_and_gradients(lambda: ours(images), [images, *ours.parameters()], direction)
    expected, expected_gradients = value_and_gradients(lambda: plain(images), [images, *plain.parameters()], direction)
    assert value.equal(expected) and value.stride() == expected.stride()
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-2, rtol=1e-2)


def test_group_norm_gradients_are_those_of_float64():
    norm = SIMGroupNorm(4, 12)
    nn.init.normal_(norm.weight)
    images, direction = channels_last(2, 12, 5, 7).requires_grad_(), channels_last(2, 12, 5, 7)
    _, (of_images, *of_norm) = value_and_gradients(lambda: norm(images), [images, *norm.parameters()], direction)
    exact = nn.GroupNorm(4, 12).double()
    exact.load_state_dict(norm.state_dict())
    exact_images = images.detach().double().requires_grad_()
    _, (expected, *expected_of_norm) = value_and_gradients(
        lambda: exact(exact_images), [exact_images, *exact.parameters()], direction
    )
    torch.testing.assert_close(of_images.double(), expected, atol=1e-2, rtol=1e-2)  # stored in bfloat16
    torch.testing.assert_close([x.double() for x in of_norm], expected_of_norm, atol=1e-4, rtol=1e-4)
