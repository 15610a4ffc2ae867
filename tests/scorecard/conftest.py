"""A data set and a model of a few thousand weights for the faults that need a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from factories import save_tiny_model, write_shapes

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
TIMEOUT = 1500  # seconds, on a loaded machine


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("scorecard") / "shapes", num_train=7)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("scorecard") / "model")


@pytest.fixture
def command(data, model):
    """command(output_dir, **options) -> the words of `sim-hf train` for a run of a few steps."""

    def words(output_dir, **options):
        values = {"data": data, "model": model, "output_dir": output_dir, "max_steps": 4, "batch_size": 2, "lr_warmup": 0}
        values |= {"eval_every": 0, "checkpoint_every": 0, "log_every": 1, "num_prototypes": 3, "pseudo_start": 0}
        values |= {"report_to": "none", "mixed_precision": "no", "paste_probability": 0.5, **options}
        return ["train", *(part for name, value in values.items() for part in (f"--{name}", str(value)))]

    return words


@pytest.fixture
def two_ranks():
    """two_ranks(words of the command, ...) -> the finished process of torchrun with two ranks on the CPU."""

    def launch(words, script=SCRIPT):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        return subprocess.run([*launcher, *map(str, words)], env=environment, capture_output=True, text=True, timeout=TIMEOUT)

    return launch
