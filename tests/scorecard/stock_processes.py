"""torch's own parallel training and loading under the faults of several processes."""

from __future__ import annotations

import datetime
import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

WAIT = datetime.timedelta(seconds=20)  # that a rank waits for the other; by default it is half an hour


def _on_two_ranks(folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns on each of two ranks, or its error in words."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                warnings.simplefilter("ignore")
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=WAIT)
                found = work(rank)
            except Exception as error:
                found = f"{type(error).__name__}: {str(error).split('. ')[0].splitlines()[0]}"
            (folder / f"{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


class _ClassesAndMasks(nn.Module):
    """The mask layer is used where there are objects. It counts them in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.masks = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("num_objects", torch.zeros(()))

    def forward(self, num_objects: int) -> torch.Tensor:
        self.num_objects += num_objects
        loss = self.classes(torch.ones(1, 2)).sum()
        return loss + self.masks(torch.ones(num_objects, 2)).sum() if num_objects else loss


def rank_without_objects(folder: Path) -> str:
    def work(rank: int) -> str:
        network = DistributedDataParallel(_ClassesAndMasks())
        for _ in range(2):
            network(3 * (1 - rank)).backward()
        return "goes on"

    with_objects, without = _on_two_ranks(folder, work)
    ends = [said.split(" in the prior")[0].split(": [")[0] for said in (without, with_objects)]
    return f"torch's DDP, the rank without objects in its next step: {ends[0]}; the other: {ends[1]}"


def buffers_of_two_ranks(folder: Path) -> str:
    def work(rank: int) -> int:
        network = DistributedDataParallel(_ClassesAndMasks())
        for _ in range(2):
            network(2 + 2 * rank).backward()
        distributed.barrier()
        return int(network.module.num_objects)

    counted = _on_two_ranks(folder, work)
    return f"torch's DDP has counted {counted[0]} objects on one rank and {counted[1]} on the other, of 12 that both have seen"


class _Drawn(Dataset):
    """What each sample draws from torch's generator; one of them kills the process that loads it."""

    def __init__(self, deadly: int = -1) -> None:
        self.deadly = deadly

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.rand(()).item()


def loading_processes(folder: Path) -> str:
    drawn = []
    for num_workers in (0, 1, 2):
        torch.manual_seed(0)
        drawn.append([round(float(value), 6) for value in DataLoader(_Drawn(), batch_size=None, num_workers=num_workers)])
    try:
        list(DataLoader(_Drawn(deadly=2), batch_size=None, num_workers=1))
        said = "goes on"
    except RuntimeError as error:
        said = f"raises as well ({type(error).__name__})"
    different = len({tuple(values) for values in drawn})
    return f"torch {said}; with 0, 1 and 2 of them the same samples draw {different} different rows of random numbers"


MEASUREMENTS = {8: rank_without_objects, 9: buffers_of_two_ranks, 28: loading_processes}
