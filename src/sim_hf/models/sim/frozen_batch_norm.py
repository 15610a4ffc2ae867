"""Frozen batch normalisation inside the convolution before it: the same function, one pass over the feature map less.

A BatchNorm in evaluation mode is a scale and a shift per channel, and a convolution is linear, so both fit into its
weights. Forward and backward then skip the norm, and its input need not be kept. In training mode nothing changes, and
neither do the names of the weights.

Shape letters: B images, C channels, H and W rows and columns.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import is_timm_available

from .depthwise_convolution import convolve, has_slow_backward


class FoldingConv2d(nn.Conv2d):
    """A convolution that also does the work of the norm after it, while that is frozen."""

    following_norm: nn.BatchNorm2d

    def forward(self, input: Tensor) -> Tensor:
        norm = self.following_norm
        if not _is_folded(self, norm):
            return super().forward(input)
        assert norm.running_var is not None and norm.running_mean is not None
        scale_C = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift_C = norm.bias - norm.running_mean * scale_C
        if self.bias is not None:
            shift_C = shift_C + self.bias * scale_C
        return self._conv_forward(input, self.weight * scale_C[:, None, None, None], shift_C)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if has_slow_backward(self, input):
            return convolve(self, input, weight, bias)
        return super()._conv_forward(input, weight, bias)


class FoldingBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that has nothing left to do while it is frozen."""

    convolution: nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return input if _is_folded(self.convolution, self) else super().forward(input)


class _ReLU6(torch.autograd.Function):
    """nn.ReLU6 in the place of its input. Its slope is read from the output, which the next convolution keeps anyway; torch's
    own keeps a copy of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clamp_(0, 6))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, output, 0.0, 6.0)


_FOLDING_NORMS: dict[type, type] = {nn.BatchNorm2d: FoldingBatchNorm2d}

if is_timm_available():
    from timm.layers.norm_act import BatchNormAct2d

    class FoldingBatchNormAct2d(BatchNormAct2d):
        """timm's norm with an activation, which has only the activation left while it is frozen."""

        convolution: nn.Conv2d
        act: nn.Module
        drop: nn.Module

        def forward(self, x: Tensor) -> Tensor:
            if not _is_folded(self.convolution, cast(nn.BatchNorm2d, self)):  # what timm's decorator hides from type checkers
                return super().forward(x)
            x = self.drop(x)
            return _ReLU6.apply(x) if type(self.act) is nn.ReLU6 and x.requires_grad else self.act(x)

    _FOLDING_NORMS[BatchNormAct2d] = FoldingBatchNormAct2d


def fold_batch_norms(backbone: nn.Module) -> int:
    """Let every plain convolution of `backbone` that a batch norm follows directly do the norm's work while that is frozen
    -> the number of pairs."""
    pairs = _pairs(backbone)
    for convolution_name, norm_name in pairs:
        convolution, norm = backbone.get_submodule(convolution_name), backbone.get_submodule(norm_name)
        convolution.__class__, norm.__class__ = FoldingConv2d, _FOLDING_NORMS[type(norm)]
        # Not submodules of each other: that would name their weights twice.
        object.__setattr__(convolution, "following_norm", norm)
        object.__setattr__(norm, "convolution", convolution)
    return len(pairs)


def _is_folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Both ask the same question. On two devices (a device map, weights that wait on the disk) each does its own work."""
    return not norm.training and convolution.weight.device == norm.weight.device


@torch.no_grad()
def _pairs(backbone: nn.Module) -> list[tuple[str, str]]:
    """Names of the convolutions and norms where the norm, and nothing else, reads what the convolution returned, seen in one
    forward pass without numbers."""
    if not any(_is_foldable(module) for module in backbone.modules()):
        return []
    skeleton = copy.deepcopy(backbone).to("meta", torch.float32).eval()
    reads = _Reads()
    outputs: list[tuple[str, Tensor]] = []
    inputs: dict[int, str] = {}

    def watch(name: str, module: nn.Module) -> None:
        if type(module) is nn.Conv2d:
            module.register_forward_hook(lambda _, __, output: outputs.append((name, cast(Tensor, output))))
        elif _is_foldable(module):
            module.register_forward_pre_hook(lambda _, given: inputs.update({id(given[0]): name}))

    for name, module in skeleton.named_modules():
        watch(name, module)
    with reads:
        skeleton(torch.zeros(1, 3, 256, 256, device="meta"))
    count = Counter(map(id, reads.tensors))  # all of them are alive, so an id is one tensor's
    return [(name, inputs[id(x)]) for name, x in outputs if id(x) in inputs and count[id(x)] == 1]


def _is_foldable(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return type(module) in _FOLDING_NORMS and bool(module.affine) and bool(module.track_running_stats)


class _Reads(TorchDispatchMode):
    """Keeps every tensor that an operation reads, once for each time."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.tensors += [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        return func(*args, **(kwargs or {}))
