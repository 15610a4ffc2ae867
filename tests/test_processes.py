"""Processes that torchrun starts find each other, also where there is no accelerator."""

import os
import subprocess
import sys

PRINT = "from sim_hf.processes import process_state; s = process_state(); print('shard', s.process_index, 'of', s.num_processes)"


def test_two_processes_share_the_work(tmp_path):
    script = tmp_path / "shard.py"
    script.write_text(PRINT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    done = subprocess.run(
        [*launch, "--rdzv-endpoint", "localhost:0", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("shard")) == ["shard 0 of 2", "shard 1 of 2"]


def test_one_process_is_alone():
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "shard 0 of 1"
