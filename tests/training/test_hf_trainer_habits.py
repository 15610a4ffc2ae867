"""What people expect of a Trainer: COCO AP while training, the best model at the end, trackers that see every loss."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_two_processes import launch_two
from worker_trainer_evaluation import sim_trainer, stock_trainer

from factories import tiny_processor, write_shapes
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.state_files import load_state
from sim_hf.training.stock_trainer import TRAINING_STATE

HERE = Path(__file__).parent
LOSSES = {"loss_cross_entropy", "loss_projection", "loss_pairwise"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("habits") / "shapes")


def evaluated(trainer):
    return [line for line in trainer.state.log_history if "eval_segm/AP" in line]


@pytest.mark.parametrize("make", [sim_trainer, stock_trainer])
def test_coco_ap_is_measured_while_training_and_chooses_the_best_model(make, data, tmp_path, monkeypatch):
    """AP is made to fall, so that the first checkpoint of a Swin is the best one, and must come back whole."""
    scores = iter([0.5, 0.4, 0.3])

    def measure(*arguments, **options):
        measured, evaluator = evaluate_model(*arguments, **options)
        return {**measured, "segm/AP": next(scores)}, evaluator

    monkeypatch.setattr("sim_hf.training.hf_trainer.evaluate_model", measure)
    monkeypatch.setattr("sim_hf.training.stock_trainer.evaluate_model", measure)
    trainer = make(
        data,
        tmp_path,
        backbone="swin",
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="segm/AP",
    )
    trainer.train()
    assert [line["eval_segm/AP"] for line in evaluated(trainer)] == [0.5, 0.4, 0.3]
    assert trainer.state.best_global_step == 1
    best = SIMForInstanceSegmentation.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    last = load_state(tmp_path / "checkpoint-3" / TRAINING_STATE)["model"]
    found = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in best.items())
    assert any(not torch.equal(last[name], tensor) for name, tensor in best.items())


def test_the_adapter_measures_the_student(data, tmp_path):
    trainer = stock_trainer(data, tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    expected, _ = evaluate_model(trainer.model, tiny_processor(), trainer.measured_rows, progress=None)
    (line,) = evaluated(trainer)
    assert {name: line[f"eval_{name}"] for name, value in expected.items() if value is not None} == pytest.approx(
        {name: value for name, value in expected.items() if value is not None}
    )
    assert line["eval_loss"] > 0


def test_a_stock_trainer_that_resumes_without_the_adapters_state_is_stopped(data, tmp_path):
    stock_trainer(data, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    again = stock_trainer(data, tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match=r"goes on at step 1, the teacher and prototypes at 0: call adapter\.load"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("make", [sim_trainer, stock_trainer])
def test_tensorboard_sees_every_loss_and_the_ap(make, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make(data, tmp_path, max_steps=1, report_to="tensorboard", eval_strategy="steps", eval_steps=1).train()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    seen = {tag.rpartition("/")[2] if tag.startswith("train/") else tag for tag in events.Tags()["scalars"]}
    assert seen >= LOSSES and "eval/segm/AP" in seen


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_other_trackers_take_the_losses_without_a_network(tracker, data, tmp_path, monkeypatch):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    module = importlib.import_module(tracker)
    target = module.Run if tracker == "wandb" else module  # wandb.log is made anew by every run
    sent, log = [], target.log

    def spy(*arguments, **options):
        sent.extend(dict(values) for values in arguments if isinstance(values, dict))
        return log(*arguments, **options)

    monkeypatch.setattr(target, "log", spy)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    sim_trainer(data, tmp_path, max_steps=1, report_to=tracker).train()
    assert any({f"train/{name}" for name in LOSSES} <= values.keys() for values in sent)


def test_two_processes_evaluate_in_both_trainers_as_one_does(data, tmp_path):
    """Lists of boxes of different lengths hang or break the evaluation of a stock Trainer that gathers them."""
    launch_two(HERE / "worker_trainer_evaluation.py", data, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and set(ranks[0]) == {"sim", "stock"}
    for name, make in (("sim", sim_trainer), ("stock", stock_trainer)):
        alone = make(data, tmp_path / name, max_steps=1, learning_rate=0.0, eval_strategy="steps", eval_steps=1)
        alone.train()
        (line,) = evaluated(alone)
        AcceleratorState._reset_state(True)
        assert ranks[0][name] == pytest.approx(
            {key: value for key, value in line.items() if "AP" in key or "AR" in key}, abs=1e-6
        )
