"""Training for long: memory and open files stay where they were, and the memory bank keeps to its bounds. `make soak`."""

import psutil
import pytest
from growth import Growth

from factories import make_arguments, save_tiny_model, write_shapes
from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.training.trainer import Trainer

FLAT = 10  # MB per 1000 steps
MAX_BANK_IMAGES = 20


def train(arguments, num_steps):
    trainer = Trainer(arguments)
    growth = Growth()
    take_step = trainer.optimizer_step

    def watched(stream):
        record = take_step(stream)
        if trainer.step.global_step % (num_steps // 30) == 0:
            growth.sample(trainer.step.global_step)
        return record

    trainer.optimizer_step = watched
    trainer.train()
    assert trainer.step.global_step == num_steps
    return trainer, growth


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_29_three_hundred_steps(tmp_path, capsys):
    data = write_shapes(tmp_path / "data", num_train=40)
    options = {"supervision": "sim", "alpha": 0.5, "bank_capacity": MAX_BANK_IMAGES, "checkpoint_every": 0.25, "log_every": 50}
    arguments = make_arguments(data, save_tiny_model(tmp_path / "model"), tmp_path / "run", max_steps=300, **options)
    trainer, growth = train(arguments, 300)
    with capsys.disabled():
        print(growth)
    assert 0 < len(trainer.step.memory_bank) <= MAX_BANK_IMAGES
    assert growth.megabytes_per_thousand * 0.3 < 3 * FLAT and growth.more_files <= 0


@pytest.mark.soak
@pytest.mark.timeout(10_800)
def test_two_thousand_steps_of_the_tiny_preset(tmp_path, capsys):
    """With two processes that load, evaluation, checkpoints and copy-paste on."""
    data = write_shapes(tmp_path / "data", num_train=200, num_val=10)
    names = {0: "ellipse", 1: "rectangle"}
    SIMForInstanceSegmentation(SIMConfig.from_preset("tiny", id2label=names)).save_pretrained(tmp_path / "model")
    SIMImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path / "model")
    options = {"supervision": "sim", "bank_capacity": MAX_BANK_IMAGES, "checkpoint_every": 0.1, "eval_every": 0.25}
    options |= {"num_workers": 1, "log_every": 100, "batch_size": 2, "pseudo_start": 0.1}
    trainer, growth = train(make_arguments(data, tmp_path / "model", tmp_path / "run", max_steps=2000, **options), 2000)
    with capsys.disabled():
        print(growth)
    assert len(trainer.step.memory_bank) <= MAX_BANK_IMAGES
    assert growth.megabytes_per_thousand < FLAT and growth.more_files <= 0
    assert psutil.Process().num_threads() < 100
