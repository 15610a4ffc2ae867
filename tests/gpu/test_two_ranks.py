"""Two ranks on one GPU are one process with the joint batch, and they stay in step."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worker_two_ranks import two_ranks_arguments

from factories import save_tiny_model, write_shapes
from sim_hf.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")]


def a_free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch_two(*command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NVIDIA_TF32_OVERRIDE": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": a_free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]


def test_two_ranks_on_one_gpu_equal_one_process_with_the_joint_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    data = write_shapes(tmp_path, empty=(0, 1, 2, 4, 6))
    save_tiny_model(data / "model")
    launch_two(Path(__file__).parent / "worker_two_ranks.py", data)
    first, second = (torch.load(data / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []

    trainer = Trainer(two_ranks_arguments(data, data / "one", batch_size=4))
    trainer.train()
    for name, tensor in trainer.student.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    lines = [[json.loads(line) for line in (data / run / "metrics.jsonl").read_text().splitlines()] for run in ("two", "one")]
    for line, expected in zip(*lines, strict=True):
        for name in [name for name in expected if name.startswith("loss") or name == "gradient_norm"]:
            assert line[name] == pytest.approx(expected[name], rel=1e-3), name
