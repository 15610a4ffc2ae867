"""The processes that share a command's work."""

from __future__ import annotations

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """This process among those that torchrun or `accelerate launch` started (alone otherwise).

    Without `cpu=True` Accelerate takes every process on a machine without accelerators for the only one: each would do
    all of the work, and remove the others' files.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def leave_process_group() -> None:
    """The end of a command that shared its work: wait for the others, then close the connections. A process that just exits
    can abort while another still talks to it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
