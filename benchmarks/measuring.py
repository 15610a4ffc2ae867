"""Two ways to the same result, measured side by side in one process: a row of the table of `speed.py`."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

WARM_UPS = {"cpu": 1, "cuda": 3}  # a GPU's libraries choose their kernels in the first calls


@dataclass
class Row:
    """A part beside its peer. Times are medians in seconds; memory is the peak above what was there, in MiB, of the device;
    goals are ratios ours / peer. `equal`: both gave the same result. `note`: what else a reader should know."""

    part: str
    peer: str
    ours_seconds: float
    peer_seconds: float
    ratio: float
    goal: float | None
    ours_mib: float
    peer_mib: float
    memory_ratio: float | None
    memory_goal: float | None
    equal: bool
    note: str = ""


def compare(
    part: str,
    peer_name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    equal: bool,
    goal: float | None,
    memory_goal: float | None = None,
    repeats: int = 5,
    note: str = "",
    device: str = "cpu",
) -> Row:
    """Both once (on a GPU some times) to warm up, once each for the memory, then in turns, so that what else the machine does
    hits both."""
    for _ in range(WARM_UPS[device]):
        ours(), peer()
    ours_mib, peer_mib = peak_mib(ours, device), peak_mib(peer, device)
    ours_seconds, peer_seconds = [], []
    for _ in range(repeats):
        peer_seconds.append(seconds(peer, device))
        ours_seconds.append(seconds(ours, device))
    return Row(
        part=part,
        peer=peer_name,
        ours_seconds=statistics.median(ours_seconds),
        peer_seconds=statistics.median(peer_seconds),
        ratio=statistics.median(ours_seconds) / statistics.median(peer_seconds),
        goal=goal,
        ours_mib=ours_mib,
        peer_mib=peer_mib,
        memory_ratio=ours_mib / peer_mib if peer_mib > 0 else None,
        memory_goal=memory_goal,
        equal=equal,
        note=note,
    )


def now(device: str = "cpu") -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    start = now(device)
    call()
    return now(device) - start


def peak_mib(call: Callable[[], object], device: str = "cpu") -> float:
    """Peak memory while `call` runs, above what was taken before: of a GPU what torch has allocated, of a CPU the process's
    resident memory (Linux with glibc)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before_bytes) / 2**20
    # Or what an earlier call has freed, which stays resident, would hide what this one takes: the second side would win.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = status_kib("VmRSS")
    call()
    return (status_kib("VmHWM") - before) / 1024


def status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")
