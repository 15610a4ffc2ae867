"""The teacher: an exponential moving average of the student (SIM, Sec. 3.2; momentum 0.9999 in the paper).

It lives beside the model, never in the weights that a user loads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sim_hf.training.sharding import whole

PAPER_MOMENTUM = 0.9999
PAPER_HORIZON_FRACTION = 1 / 9  # 0.9999 remembers 10k steps, of the paper's 90k
_NUM_TICKS = "num_ticks"
_MODEL_PREFIX = "model."


def momentum_for_steps(
    total_steps: int,
    *,
    horizon_fraction: float = PAPER_HORIZON_FRACTION,
    minimum: float = 0.9,
    maximum: float = PAPER_MOMENTUM,
) -> float:
    """Momentum whose memory, 1 / (1 - momentum) steps, is the paper's share of the run: 90k steps give 0.9999, 9k give 0.999.

    The paper's own number would keep the teacher of a short run near its start for all of the run.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 < horizon_fraction <= 1:
        raise ValueError(f"horizon_fraction must be in (0, 1], got {horizon_fraction}")
    return min(max(1 - 1 / max(horizon_fraction * total_steps, 1), minimum), maximum)


class EMATeacher:
    """Average of the student over optimiser steps: exact copy at the start, always float32, eval mode, without gradients.

    `tick` uses momentum min(momentum, 1 - 1 / (t + 1)) at the t-th tick: the plain mean of all states so far, until the
    memory is as long as `momentum` says. So the start, which knows nothing of the task, is forgotten quickly.
    """

    def __init__(self, model: nn.Module, *, momentum: float = PAPER_MOMENTUM, warm_start: bool = True) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.warm_start = warm_start
        self.num_ticks = 0
        # float32 whatever the student is: in bfloat16 a step of 1e-4 is below the resolution, and the teacher would not move.
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's forward, without gradients; autocast is the caller's."""
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def momentum_at(self, tick: int) -> float:
        """Momentum of the `tick`-th tick, from 1."""
        return min(self.momentum, 1 - 1 / (tick + 1)) if self.warm_start else self.momentum

    @torch.no_grad()
    def tick(self, student: nn.Module) -> None:
        """Move towards the student; once per optimiser step, and not on a skipped one. `student` is the unwrapped model.

        Float parameters and buffers are averaged, buffers of integers are copied.
        """
        mine, theirs = _named_tensors(self.model), _named_tensors(student)
        if mine.keys() != theirs.keys():
            differing = sorted(mine.keys() ^ theirs.keys())
            raise ValueError(
                f"student and teacher differ in {len(differing)} tensors, such as {differing[:3]}; "
                "pass the unwrapped model (not the DistributedDataParallel or compiled one) that the teacher was made from"
            )
        averaged: list[Tensor] = []
        targets: list[Tensor] = []
        for name, tensor in mine.items():
            other = whole(theirs[name].detach())
            if tensor.is_floating_point():
                averaged.append(tensor)
                targets.append(other.to(device=tensor.device, dtype=tensor.dtype))
            else:
                tensor.copy_(other)
        weight = 1 - self.momentum_at(self.num_ticks + 1)
        if averaged:
            torch._foreach_lerp_(averaged, targets, weight)
        self.num_ticks += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Weights (prefixed "model.") and the number of ticks, as plain tensors. They are the teacher's own, not copies."""
        state = {f"{_MODEL_PREFIX}{name}": tensor for name, tensor in self.model.state_dict().items()}
        state[_NUM_TICKS] = torch.tensor(self.num_ticks, dtype=torch.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; every name and shape must match, or nothing is changed."""
        expected = self.state_dict()
        if expected.keys() != state.keys():
            missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
            raise ValueError(
                f"teacher state lacks {len(missing)} tensors {missing[:3]}, has {len(surplus)} unknown {surplus[:3]}"
            )
        for name, tensor in expected.items():
            given = state[name]
            if (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"teacher state {name!r} is {given.dtype} {tuple(given.shape)}, expected {tensor.dtype} {tuple(tensor.shape)}"
                )
        weights = {name.removeprefix(_MODEL_PREFIX): tensor for name, tensor in state.items() if name != _NUM_TICKS}
        self.model.load_state_dict(weights, strict=True)
        self.num_ticks = int(state[_NUM_TICKS])


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
