"""What a process holds while it works for long: resident memory and open files."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import numpy as np
import psutil


@dataclass
class Growth:
    """Samples of (units of work done, MB resident, open files) of a process."""

    process: psutil.Process = field(default_factory=psutil.Process)
    samples: list[tuple[int, float, int]] = field(default_factory=list)

    def sample(self, done: int) -> None:
        if self.process.pid == psutil.Process().pid:
            gc.collect()
        self.samples.append((done, self.process.memory_info().rss / 2**20, self.process.num_fds()))

    @property
    def settled(self) -> np.ndarray:
        """Without the first third, in which caches fill and what loads on first use is loaded."""
        return np.array(self.samples[len(self.samples) // 3 :])

    @property
    def megabytes_per_thousand(self) -> float:
        """Slope of the resident memory per 1000 units of work."""
        done, megabytes, _ = self.settled.T
        return float(np.polyfit(done, megabytes, 1)[0] * 1000)

    @property
    def more_files(self) -> int:
        return int(self.settled[-1, 2] - self.settled[0, 2])

    def __str__(self) -> str:
        curve = self.samples[:: max(1, len(self.samples) // 5)] + self.samples[-1:]
        peak = max(megabytes for _, megabytes, _ in self.samples)
        shown = ", ".join(f"{done}: {megabytes:.0f} MB {files} files" for done, megabytes, files in dict.fromkeys(curve))
        return f"{shown}; at most {peak:.0f} MB, {self.megabytes_per_thousand:+.1f} MB per 1000 after the first third"
