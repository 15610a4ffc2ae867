"""SIGTERM as a wish: what a scheduler sends some seconds before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM has ended


class StopRequest:
    """Within `with StopRequest(accelerator) as stop:` SIGTERM ends nothing; it is noted, and `stop.agreed()` tells of it.

    Signals reach Python's main thread only: in another one this hears nothing and SIGTERM stays what it was.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def agreed(self) -> bool:
        """Whether any rank was told to stop. All ranks call it at the same place, or they would save different steps."""
        if self.accelerator.num_processes > 1:
            told: Any = self.accelerator.reduce(torch.tensor([float(self.asked)], device=self.accelerator.device), "sum")
            self.asked = bool(told.item() > 0)
        return self.asked

    def _note(self, number: int, frame: object) -> None:
        self.asked = True
