"""The Space as a visitor meets it, and what arrives at it over the network."""

import struct
import sys
import zlib

import pytest

from running_space import SPACE, running_space

sys.path.insert(0, str(SPACE))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running_space(tmp_path_factory.mktemp("space")) as running:
        yield running


@pytest.fixture
def hurried_server(tmp_path):
    """A Space that keeps uploads for seconds instead of an hour."""
    program = "import app; app._CLEAN_EVERY, app._FILES_LIVE = 1, 2; app.main()"
    with running_space(tmp_path, "-c", program) as running:
        yield running


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
