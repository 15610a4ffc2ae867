"""Processes that die in the middle of what they do, and files that lose a bit."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child -> its wait status. The child never returns into pytest."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_at_file_operation(number: int, root: Path) -> None:
    """SIGKILL this process at its `number`-th operation that touches `root` or syncs a file."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        inside = any(str(root) in str(argument) for argument in arguments)
        if event in ("os.remove", "os.rmdir") or (inside and event in ("open", "os.mkdir", "os.rename", "os.scandir")):
            tick()  # rmtree removes by names relative to an open folder

    fsync = os.fsync
    os.fsync = lambda descriptor: (tick(), fsync(descriptor))[1]
    sys.addaudithook(hook)


def flip_bit(file: Path) -> None:
    """Change the bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
