"""The Space as a visitor meets it: a process of its own, and what arrives at it over the network."""

import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

SPACE = Path(__file__).resolve().parents[2] / "spaces" / "box-supervised-segmentation"
sys.path.insert(0, str(SPACE))
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
def running_space(folder, *program):
    """A Space in a process of its own -> its Server."""
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
    process = subprocess.Popen([sys.executable, *program], cwd=SPACE, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url, process, folder / "log.txt")
        yield Server(url, process, folder / "cache")
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running_space(tmp_path_factory.mktemp("space"), str(SPACE / "app.py")) as running:
        yield running


@pytest.fixture
def hurried_server(tmp_path):
    """A Space that keeps uploads for seconds instead of an hour."""
    program = "import app; app._CLEAN_EVERY, app._FILES_LIVE = 1, 2; app.main()"
    with running_space(tmp_path, "-c", program) as running:
        yield running


def wait_until_up(url, process, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/gradio_api/startup-events", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"the Space has not started:\n{log.read_text()}")


@pytest.fixture
def bomb(tmp_path):
    """bomb(width, height, bits=1 | 8, channels=1 | 3) -> path of a complete, black PNG that is tiny beside its pixels."""

    def make(width, height, bits=1, channels=1):
        row = b"\0" + bytes((width * bits * channels + 7) // 8)
        packer = zlib.compressobj(1)
        data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
        header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 3: 2}[channels], 0, 0, 0)
        path = tmp_path / f"{width}x{height}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b""))
        return path

    return make


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
