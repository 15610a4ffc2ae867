"""A run that was stopped, or killed, ends with the very bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from factories import make_arguments, save_tiny_model, write_shapes
from sim_hf.training.resume import random_state, restore_random_state
from sim_hf.training.state_files import CheckpointError
from sim_hf.training.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS = 8
TIMEOUT = 1500  # seconds, on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=7)  # an epoch ends inside a step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def options_of(supervision, **options):
    return {
        "supervision": supervision,
        "max_steps": STEPS,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_warmup": 0.25,
        "learning_rate": 2e-3,
        "pairwise_warmup": 0.5,
        "pseudo_start": 0.25,
        "second_phase": 0.75,
        "paste_probability": 0.5,
        **options,
    }


def run(data, model, folder, **options):
    trainer = Trainer(make_arguments(data, model, folder, **options))
    trainer.train()
    return trainer


def command_line(data, model, folder, **options):
    """The same run as a command of its own."""
    values = {"data": data, "model": model, "output_dir": folder, "report_to": "none", "mixed_precision": "no", **options}
    values |= {"eval_every": 0, "log_every": 1, "num_prototypes": 3, "scale_min": 0.9, "scale_max": 1.1}
    values = {"checkpoint_every": 0, **values}
    return [sys.executable, str(SCRIPT), *(part for name, value in values.items() for part in (f"--{name}", str(value)))]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def differences(found, expected, name=""):
    """Paths at which two nests of tensors, numbers and containers differ, bit for bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(found, expected) else [name]
    if isinstance(expected, dict):
        if list(found) != list(expected):
            return [f"{name}: {sorted(map(str, set(found) ^ set(expected)))}"]
        return [path for key in expected for path in differences(found[key], expected[key], f"{name}/{key}")]
    if isinstance(expected, (list, tuple)):
        pairs = enumerate(zip(found, expected, strict=True))
        return [path for index, (a, b) in pairs for path in differences(a, b, f"{name}/{index}")]
    return [] if found == expected else [f"{name}: {found} instead of {expected}"]


@pytest.mark.parametrize("supervision", ["boxinst", "sim"])
def test_a_run_in_three_parts_equals_an_unbroken_one_bit_for_bit(supervision, data, model, tmp_path):
    options = options_of(supervision)
    whole = run(data, model, tmp_path / "whole", **options)
    if supervision == "sim":  # or the comparison would say little
        assert whole.step.prototype_bank.counts_KL.max() > 1
        assert len(whole.step.memory_bank) > 0

    parts = tmp_path / "parts"
    run(data, model, parts, **options, stop_after=3)
    command = command_line(data, model, parts, **options, stop_after=5, resume="auto")
    subprocess.run(command, check=True, env=environment(), capture_output=True, timeout=TIMEOUT)
    torch.rand(10)
    last = Trainer(make_arguments(data, model, parts, **options, resume="auto"))
    last.train()
    assert last.step.global_step == STEPS
    assert differences(last.resumer._state(), whole.resumer._state()) == []
    exported = [(folder / "model" / "model.safetensors").read_bytes() for folder in (parts, tmp_path / "whole")]
    assert exported[0] == exported[1]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, model, tmp_path):
    options = options_of("sim")
    whole = run(data, model, tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    command = command_line(data, model, folder, **options, checkpoint_every=1 / STEPS)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (folder / "checkpoints" / "step-00000002").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "the run does not get anywhere"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = Trainer(make_arguments(data, model, folder, **options, resume="auto"))
    resumed.train()
    assert differences(resumed.resumer._state(), whole.resumer._state()) == []


def test_another_run_cannot_go_on_with_a_checkpoint(data, model, tmp_path):
    run(data, model, tmp_path, max_steps=2, stop_after=1)
    with pytest.raises(CheckpointError) as raised:
        run(data, model, tmp_path, max_steps=2, resume="auto", learning_rate=0.1, seed=3)
    message = str(raised.value)
    assert "learning_rate: 0.0005 in the checkpoint, 0.1 now" in message
    assert "seed: 0 in the checkpoint, 3 now" in message


def test_options_that_compute_nothing_may_change_between_the_parts(data, model, tmp_path):
    run(data, model, tmp_path, max_steps=2, stop_after=1)
    trainer = Trainer(
        make_arguments(data, model, tmp_path, max_steps=2, resume="auto", log_every=7, num_workers=1, keep_checkpoints=3)
    )
    trainer.train()
    assert trainer.step.global_step == 2


def test_an_option_newer_than_the_checkpoint_must_have_its_default(data, model, tmp_path):
    """A package that learned an option meanwhile goes on with a run of an earlier one."""
    resumer = run(data, model, tmp_path, max_steps=2, stop_after=1).resumer
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    metadata = resumer.manager.metadata(checkpoint)
    del metadata["identity"]["zoom"]
    resumer._check_same_run(checkpoint, metadata)
    resumer.identity["zoom"] = 0.5
    with pytest.raises(CheckpointError, match=r"zoom: 0\.0 in the checkpoint, 0\.5 now"):
        resumer._check_same_run(checkpoint, metadata)


def test_a_checkpoint_can_be_named(data, model, tmp_path):
    run(data, model, tmp_path / "a", max_steps=4, checkpoint_every=0.25, keep_checkpoints=4)
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000002"
    trainer = Trainer(make_arguments(data, model, tmp_path / "b", max_steps=4, resume=str(checkpoint)))
    trainer.train()
    exported = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab"]
    assert exported[0] == exported[1]


def test_a_checkpoint_that_does_not_exist_is_named_in_the_error(data, model, tmp_path):
    with pytest.raises(CheckpointError, match="step-00000009"):
        run(data, model, tmp_path, resume=str(tmp_path / "step-00000009"))


def test_going_back_to_an_earlier_checkpoint_sets_later_ones_aside(data, model, tmp_path):
    options = {"max_steps": 4, "checkpoint_every": 0.25, "keep_checkpoints": 4}
    run(data, model, tmp_path, **options)
    first = tmp_path / "checkpoints" / "step-00000001"
    run(data, model, tmp_path, **options, resume=str(first), stop_after=2)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == ["step-00000001", "step-00000002"]


def test_the_random_state_of_all_generators_comes_back():
    state = random_state()
    drawn = (torch.rand(3), np.random.rand(3), random.random())
    restore_random_state(state)
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]
