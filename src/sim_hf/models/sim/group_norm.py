"""Group normalisation of channels-last maps in bfloat16 on a CPU: torch's forward, and a backward in matrix form.

torch's own backward reads such maps number by number: five times the time at 64 x 64 cells.

Shape letters: B images, C channels, G groups, H and W rows and columns, M = H W cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SIMGroupNorm(nn.GroupNorm):
    """nn.GroupNorm with another backward where torch's is slow."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            self.affine
            and input.dtype == torch.bfloat16
            and input.device.type == "cpu"
            and input.ndim == 4
            and torch.is_grad_enabled()
            and input.is_contiguous(memory_format=torch.channels_last)
        ):
            return _ChannelsLastGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(input)


class _ChannelsLastGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, epsilon: float) -> Tensor:
        batch_size, num_channels, height, width = input_BCHW.shape
        output, mean_BG, scale_BG = torch.ops.aten.native_group_norm(
            input_BCHW, weight_C, bias_C, batch_size, num_channels, height * width, num_groups, epsilon
        )
        ctx.save_for_backward(input_BCHW, weight_C, mean_BG, scale_BG)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        input_BCHW, weight_C, mean_BG, scale_BG = ctx.saved_tensors
        batch_size, num_channels = input_BCHW.shape[:2]
        num_groups = mean_BG.shape[1]
        mean_BC, scale_BC = (x.float().repeat_interleave(num_channels // num_groups, 1) for x in (mean_BG, scale_BG))
        weight_C = weight_C.float()
        grad_input = torch.empty_like(input_BCHW)
        grad_weight_BC, grad_bias_BC = torch.empty_like(mean_BC), torch.empty_like(mean_BC)

        def group_mean(values_C: Tensor) -> Tensor:
            means_G1 = values_C.view(num_groups, -1).mean(-1, keepdim=True) / input_BCHW[0, 0].numel()
            return means_G1.expand(-1, num_channels // num_groups).flatten()

        for image in range(batch_size):  # one after the other: float32 copies of all would leave the cache
            normal_MC = _cells(input_BCHW[image]).float().sub_(mean_BC[image]).mul_(scale_BC[image])
            grad_MC = _cells(grad_BCHW[image]).float()
            grad_bias_BC[image] = grad_MC.sum(0)
            grad_weight_BC[image] = torch.linalg.vecdot(grad_MC, normal_MC, dim=0)
            # The part of the gradient along the mean and along the normalised values changes nothing behind the norm.
            along_mean_C = group_mean(grad_bias_BC[image] * weight_C)
            along_normal_C = group_mean(grad_weight_BC[image] * weight_C)
            scale_C = scale_BC[image]
            grad_MC.mul_(weight_C * scale_C).sub_(along_mean_C * scale_C).addcmul_(normal_MC, along_normal_C * -scale_C)
            _cells(grad_input[image]).copy_(grad_MC)
        return grad_input, grad_weight_BC.sum(0), grad_bias_BC.sum(0), None, None


def _cells(map_CHW: Tensor) -> Tensor:
    """(M, C), a view of a channels-last map."""
    return map_CHW.permute(1, 2, 0).flatten(0, 1)
