"""27 sigterm: a run that is told to end leaves a checkpoint from which it goes on exactly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from factories import make_arguments
from sim_hf.training.checkpoint import verify
from sim_hf.training.state_files import load_state
from sim_hf.training.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
TIMEOUT = 1500  # seconds, on a loaded machine
STOPPED = 128 + signal.SIGTERM


def send_at_step(trainer, step):
    """SIGTERM to this process in the middle of step `step` (counted from 0)."""
    loss = trainer.step.loss

    def interrupted(*arguments):
        if trainer.step.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    trainer.step.loss = interrupted


def same_state(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_state(found[name], expected[name]) for name in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same_state, found, expected))
    return found == expected


def test_27_a_terminated_run_goes_on_as_if_nothing_had_happened(data, model, tmp_path, capsys):
    options = {"supervision": "sim", "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    whole = Trainer(make_arguments(data, model, tmp_path / "whole", **options))
    whole.train()
    stopped = Trainer(make_arguments(data, model, tmp_path / "parts", **options))
    send_at_step(stopped, 1)
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == STOPPED
    assert "SIGTERM: stopped at step 2 with a checkpoint; --resume auto goes on" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "parts" / "model").exists()
    resumed = Trainer(make_arguments(data, model, tmp_path / "parts", **options, resume="auto"))
    resumed.train()
    assert same_state(resumed.resumer._state(), whole.resumer._state())


def test_27_in_the_last_step_the_run_just_ends(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, max_steps=2))
    send_at_step(trainer, 1)
    trainer.train()
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_27_the_signal_is_given_back_after_the_run(data, model, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    Trainer(make_arguments(data, model, tmp_path, max_steps=1)).train()
    assert signal.getsignal(signal.SIGTERM) is before


WORKER = """
import os, signal, sys
from sim_hf.cli import main
from sim_hf.training import trainer
step = trainer.Trainer.optimizer_step
def interrupted(self, stream):
    if os.environ["RANK"] == "1" and self.step.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, stream)
trainer.Trainer.optimizer_step = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.e2e
def test_27_one_rank_is_told_and_both_save(command, two_ranks, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = two_ranks(command(tmp_path / "out", supervision="sim", batch_size=2), script=worker)
    assert done.returncode != 0 and f"exitcode  : {STOPPED}" in done.stderr, done.stdout[-2000:] + done.stderr[-4000:]
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000002"
    assert verify(checkpoint) == [] and (checkpoint / "rank1.json").is_file()
    assert load_state(checkpoint / "training")["step"]["global_step"] == 2
    done = two_ranks(command(tmp_path / "out", supervision="sim", batch_size=2, resume="auto")[1:])
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.e2e
def test_27_a_real_command_exits_with_143(command, tmp_path):
    words = [sys.executable, str(SCRIPT), *command(tmp_path, max_steps=100_000)[1:]]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=TIMEOUT) == STOPPED
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1
