"""What a row of the scorecard is."""

from __future__ import annotations

from dataclasses import dataclass

HARM = {
    "A": "silently wrong result or lost run",
    "B": "crash, hang or wasted hours",
    "C": "host or Space compromised or down",
    "D": "confusing",
}


@dataclass(frozen=True)
class Fault:
    """One injected fault. `tests`: pytest node ids, relative to tests/, that inject it and must all pass; `gpu_tests`: those
    that need CUDA and count for themselves. `does`, `says`, `then`: what the program does about it, what the user reads, and
    what the user can do next."""

    number: int
    name: str
    harm: str
    injected: str
    expected: str
    does: str
    says: str
    then: str
    tests: tuple[str, ...]
    gpu_tests: tuple[str, ...] = ()
    slow: bool = False

    @property
    def title(self) -> str:
        return f"{self.number:02d} {self.name}"
