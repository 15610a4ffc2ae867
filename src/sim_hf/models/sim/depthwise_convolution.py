"""Strided depthwise convolutions in bfloat16 on a CPU: the same function with a backward in float32.

oneDNN has fast kernels for them forward in bfloat16 and in both directions in float32, but the backward in bfloat16 falls
to its reference code, which takes 10 to 50 times as long (torch 2.15, AVX-512).

Shape letters: B images, C channels, H and W rows and columns, h and w of the output, k kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def has_slow_backward(convolution: nn.Conv2d, input_BCHW: Tensor) -> bool:
    """Whether this is a strided depthwise convolution that computes in bfloat16 on a CPU and will be differentiated."""
    if convolution.groups == 1 or convolution.groups != convolution.in_channels or max(convolution.stride) == 1:
        return False
    if input_BCHW.device.type != "cpu" or not torch.is_grad_enabled() or convolution.padding_mode != "zeros":
        return False
    return not isinstance(convolution.padding, str) and _compute_dtype(input_BCHW) == torch.bfloat16


def convolve(convolution: nn.Conv2d, input_BCHW: Tensor, weight_C1kk: Tensor, bias_C: Tensor | None) -> Tensor:
    """The convolution in the dtype of autocast -> (B, C, h, w); the gradients of weight and bias are float32 sums."""
    return _Float32Backward.apply(input_BCHW.to(_compute_dtype(input_BCHW)), weight_C1kk, bias_C, convolution)


def _compute_dtype(input_BCHW: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input_BCHW.dtype


class _Float32Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_BCHW: Tensor, weight_C1kk: Tensor, bias_C: Tensor | None, convolution: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(input_BCHW, weight_C1kk)
        ctx.bias_sizes = None if bias_C is None else [len(bias_C)]
        ctx.geometry = (convolution.stride, convolution.padding, convolution.dilation, False, [0, 0], convolution.groups)
        dtype = input_BCHW.dtype
        bias_C = None if bias_C is None else bias_C.to(dtype)
        return torch.ops.aten.convolution(input_BCHW, weight_C1kk.to(dtype), bias_C, *ctx.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BChw: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        input_BCHW, weight_C1kk = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], True, ctx.bias_sizes is not None]
        grad_input = torch.empty_like(input_BCHW) if mask[0] else None
        weight = weight_C1kk.float()
        grad_weight = torch.zeros_like(weight)
        grad_bias = None if ctx.bias_sizes is None else weight.new_zeros(ctx.bias_sizes)
        for image in range(len(input_BCHW)):  # one after the other: float32 copies of all would leave the cache
            one = slice(image, image + 1)
            of_input, of_weight, of_bias = torch.ops.aten.convolution_backward(
                grad_BChw[one].float(), input_BCHW[one].float(), weight, ctx.bias_sizes, *ctx.geometry, mask
            )
            if grad_input is not None:
                grad_input[one] = of_input
            grad_weight += of_weight
            if grad_bias is not None:
                grad_bias += of_bias
        return grad_input, grad_weight, grad_bias, None
