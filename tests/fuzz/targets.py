"""Everything that reads bytes of others, as `target(data: bytes) -> None`: it returns, or raises what is a finding.

A crash is a finding too, and so is more memory than `__main__` allows. `SEEDS[name]` are what mutation starts from.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import targets_of_data
import targets_of_models
import targets_of_the_space

from running_space import running_space

TARGETS: dict[str, Callable[[bytes], None]] = {**targets_of_data.TARGETS, **targets_of_models.TARGETS}
SPACE_TARGETS = targets_of_the_space.TARGETS
SEEDS: dict[str, list[bytes]] = {**targets_of_data.SEEDS, **targets_of_models.SEEDS, **targets_of_the_space.SEEDS}


@contextmanager
def ready(name: str) -> Iterator[Callable[[bytes], None]]:
    """The target of that name; for those of the Space a Space runs meanwhile."""
    if name in TARGETS:
        yield TARGETS[name]
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, running_space(Path(folder)) as server:
        space = targets_of_the_space.RunningSpace(server)
        yield functools.partial(SPACE_TARGETS[name], space)
        space.assert_alive()
