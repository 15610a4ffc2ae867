"""What all tests share: no network, one thread each, fixed seeds, no state of Accelerate."""

import os
import socket
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _number_of_threads():
    """One for each test, whatever a program under test has chosen: equal bits, and forks that work."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps the settings of a process's first run for all later ones."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Only loopback answers: a test that reaches further fails instead of hanging."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests are offline, but something connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
