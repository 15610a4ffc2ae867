"""The schedule of the paper's CondInst rows in a run: SGD, a rate that falls in steps, no clipping; both drivers."""

import json

import pytest
import torch
from transformers import TrainingArguments

from factories import make_arguments, save_tiny_model, tiny_model, tiny_processor, write_shapes
from sim_hf.data import load_coco
from sim_hf.training.arguments import DataArguments, SupervisionArguments
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.optimizer import build_optimizer, build_scheduler
from sim_hf.training.trainer import Trainer

RECIPE = {"optimizer": "sgd", "learning_rate": 1e-4, "weight_decay": 1e-4, "max_grad_norm": 0.0, "max_steps": 3}
STEPS = {"lr_schedule": "step", "lr_steps": [0.34, 0.67]}
RATES = [1e-4, 1e-5, 1e-6]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loop(data, model, tmp_path_factory):
    """The Accelerate loop -> its Trainer after the run, and the lines of metrics.jsonl."""
    folder = tmp_path_factory.mktemp("loop")
    trainer = Trainer(make_arguments(data, model, folder, export="student", **RECIPE, **STEPS))
    trainer.train()
    return trainer, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sim_trainer(data, folder, network=None, optimizers=(None, None), **options):
    return SIMTrainer(
        network or tiny_model(),
        TrainingArguments(
            str(folder),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            weight_decay=1e-4,
            max_grad_norm=0.0,
            seed=0,
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            **options,
        ),
        supervision=SupervisionArguments(supervision="boxinst"),
        image_processor=tiny_processor(),
        train_dataset=load_coco(data / "images", data / "instances_train.json", cache_dir=folder / "cache"),
        augmentation=DataArguments(scale_min=0.9, scale_max=1.1),
        optimizers=optimizers,
    )


def test_the_rate_falls_where_it_should_and_the_gradient_is_not_clipped(loop):
    trainer, lines = loop
    assert [group["momentum"] for group in trainer.optimizer.param_groups] == [0.9] * len(trainer.optimizer.param_groups)
    # A line is written after the schedule has moved on.
    assert [line["learning_rate"] for line in lines[:2]] == pytest.approx([0.2 * rate for rate in RATES[1:]])
    assert lines[0]["gradient_norm"] > 1  # what clipping to 1 would have changed


def test_sim_trainer_takes_the_same_steps(loop, data, tmp_path):
    network = tiny_model()
    optimizer = build_optimizer(
        network, optimizer="sgd", learning_rate=1e-4, backbone_lr_multiplier=0.2, weight_decay=1e-4, momentum=0.9
    )
    scheduler = build_scheduler(optimizer, schedule="step", warmup_steps=0, max_steps=3, lr_steps=[1, 2])
    trainer = sim_trainer(data, tmp_path, network, (optimizer, scheduler))
    trainer.train()
    expected, _ = loop
    for name, tensor in expected.student.state_dict().items():
        torch.testing.assert_close(trainer.student.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_sgd_of_sim_trainer_has_the_groups_and_the_momentum_of_the_loop(loop, data, tmp_path):
    def settings(optimizer):
        return [(g["initial_lr"], g["weight_decay"], g["momentum"], len(g["params"])) for g in optimizer.param_groups]

    expected, _ = loop
    trainer = sim_trainer(data, tmp_path, optim="sgd")
    trainer.create_optimizer_and_scheduler(3)
    assert settings(trainer.optimizer) == settings(expected.optimizer)
    trainer = sim_trainer(data, tmp_path, optim="sgd", optim_args="momentum=0.5")
    assert {group["momentum"] for group in trainer.create_optimizer().param_groups} == {0.5}


def test_a_run_with_momentum_goes_on_bit_for_bit(loop, data, model, tmp_path):
    for options in ({"stop_after": 2}, {"resume": "auto"}):
        trainer = Trainer(make_arguments(data, model, tmp_path, export="student", **RECIPE, **STEPS, **options))
        trainer.train()
    expected, _ = loop
    assert all(torch.equal(trainer.student.state_dict()[n], t) for n, t in expected.student.state_dict().items())
