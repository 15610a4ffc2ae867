"""When memory runs out: nothing of the step stays, and the error says how the same step fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sim_hf.training.arguments import RunArguments
from sim_hf.training.step import TrainingStep

_CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch has no class of its own for this one


@contextmanager
def explained(step: TrainingStep, optimizer: torch.optim.Optimizer, run: RunArguments) -> Iterator[None]:
    """Turn any kind of exhausted memory into a `torch.OutOfMemoryError` with advice. Gradients, observed pixels and staged
    crops of the unfinished step are dropped, so that a caller who catches it may go on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_about_memory(error):
            raise
        optimizer.zero_grad()
        step.after_skipped_update()
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise torch.OutOfMemoryError(
            f"step {step.global_step}: out of memory; nothing was changed. {_advice(run)}, and may be given with --resume auto. "
            f"({first_line})"
        ) from error


def _advice(run: RunArguments) -> str:
    now = run.gradient_accumulation_steps
    smaller = [parts for parts in range(now + 1, run.batch_size + 1) if run.batch_size % parts == 0]
    accumulate = f"--gradient_accumulation_steps {smaller[0]} makes the same update from smaller parts; " if smaller else ""
    return f"{accumulate}--activation_checkpointing needs less memory for the same update"


def _is_about_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_ALLOCATOR in str(error)
