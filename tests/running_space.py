"""The Space as a process of its own, on loopback, for those who send things to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

SPACE = Path(__file__).resolve().parents[1] / "spaces" / "box-supervised-segmentation"
START_SECONDS = 900  # on a loaded machine; a few on an idle one


@dataclass
class Server:
    url: str
    process: subprocess.Popen
    cache: Path

    def memory(self, field: str) -> int:
        """`VmRSS` (now) or `VmHWM` (the highest since `forget_peak`), in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split(f"{field}:")[1].split()[0]) // 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def running_space(folder: Path, *program: str) -> Iterator[Server]:
    """`python *program` in the folder of the Space (its app, unless another program is given) -> its Server, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    log = (folder / "log.txt").open("w")
    words = [sys.executable, *(program or ("app.py",))]
    process = subprocess.Popen(words, cwd=SPACE, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(url, process, folder / "log.txt")
        yield Server(url, process, folder / "cache")
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def _wait_until_up(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/gradio_api/startup-events", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"the Space has not started:\n{log.read_text()}")
