"""Processes that torchrun starts find each other, also where there is no accelerator."""

import os
import subprocess
import sys

SHARD = """
import pathlib, sys
from sim_hf.processes import process_state

state = process_state()
pathlib.Path(sys.argv[1], str(state.process_index)).write_text(f"shard {state.process_index} of {state.num_processes}")
"""


def _shards(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_two_processes_share_the_work(tmp_path):
    # a file for each process: what two of them print to one pipe can arrive in the middle of each other's line
    script, shards = tmp_path / "shard.py", tmp_path / "shards"
    script.write_text(SHARD)
    shards.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    done = subprocess.run(
        [*launch, "--rdzv-endpoint", "localhost:0", str(script), str(shards)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert _shards(shards) == {"0": "shard 0 of 2", "1": "shard 1 of 2"}


def test_one_process_is_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", SHARD, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert _shards(tmp_path) == {"0": "shard 0 of 1"}
