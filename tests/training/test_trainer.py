"""The Accelerate loop: a whole run, its files, and what it does when something is wrong."""

import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState

from factories import make_arguments, save_tiny_model, tiny_processor, write_shapes
from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.training.finite import NonFiniteLossError
from sim_hf.training.state_files import CheckpointError
from sim_hf.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), empty=(2,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def state_of(trainer):
    tensors = {f"student.{name}": tensor for name, tensor in trainer.student.state_dict().items()}
    tensors |= {f"teacher.{name}": tensor for name, tensor in trainer.step.teacher.state_dict().items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("supervision", ["full", "boxinst", "sim"])
def test_a_run_leaves_model_checkpoint_results_metrics_and_pictures(supervision, data, model, tmp_path):
    arguments = make_arguments(data, model, tmp_path, supervision=supervision, max_steps=2, report_to=["tensorboard"])
    metrics = Trainer(arguments).train()
    assert 0 <= metrics["segm/AP"] <= 1
    loaded = SIMForInstanceSegmentation.from_pretrained(tmp_path / "model")
    assert loaded.config.id2label == {0: "ellipse", 1: "rectangle"}
    assert loaded.config.category_ids == [3, 8]
    assert SIMImageProcessor.from_pretrained(tmp_path / "model").size["longest_edge"] == tiny_processor().size["longest_edge"]
    assert (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert json.loads((tmp_path / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    named = sum(value for name, value in lines[0].items() if name.startswith("loss_"))
    assert lines[0]["loss"] == pytest.approx(named, rel=1e-5)
    assert list((tmp_path / "pictures").glob("step-*.jpg"))
    assert list((tmp_path / "logs").rglob("events*"))


def test_the_exported_model_is_the_teacher_unless_asked_otherwise(data, model, tmp_path):
    for export in ("teacher", "student"):
        trainer = Trainer(make_arguments(data, model, tmp_path / export, max_steps=2, export=export))
        trainer.train()
        weights = SIMForInstanceSegmentation.from_pretrained(tmp_path / export / "model").state_dict()
        owner = trainer.step.teacher.model if export == "teacher" else trainer.student
        assert all(torch.equal(tensor, weights[name]) for name, tensor in owner.state_dict().items())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data, model, tmp_path):
    states = []
    for run, seed in enumerate((0, 0, 1)):
        trainer = Trainer(make_arguments(data, model, tmp_path / str(run), supervision="sim", max_steps=2, seed=seed))
        torch.rand(run + 1)
        trainer.train()
        states.append(state_of(trainer))
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert not all(torch.equal(states[2][name], tensor) for name, tensor in states[0].items())


def test_the_number_of_loader_workers_changes_nothing(data, model, tmp_path):
    states = []
    for workers in (0, 1):
        trainer = Trainer(make_arguments(data, model, tmp_path / str(workers), max_steps=2, num_workers=workers))
        trainer.train()
        states.append(state_of(trainer))
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_names_and_changes_nothing(value, data, model, tmp_path, monkeypatch):
    arguments = make_arguments(data, model, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    arguments[3].checkpoint_every = 1 / 3  # after every step
    trainer = Trainer(arguments)
    loss, before = trainer.step.loss, {}

    def poisoned(outputs, inputs, normalizers):
        output = loss(outputs, inputs, normalizers)
        if trainer.step.global_step == 1:
            before.setdefault("state", state_of(trainer))
            before.setdefault("images", []).extend(inputs.image_keys)
            output.losses["loss_projection"] = output.losses["loss_projection"] * value
        return output

    monkeypatch.setattr(trainer.step, "loss", poisoned)
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.train()
    message = str(raised.value)
    assert "step 1:" in message and "loss_projection" in message and str(before["images"]) in message
    assert "loss_cross_entropy" not in message
    after = state_of(trainer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before["state"].items())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_gradient_that_is_not_finite_stops_the_run_too(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path))
    next(trainer.student.parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = state_of(trainer)
    with pytest.raises(NonFiniteLossError, match="gradient"):
        trainer.train()
    after = state_of(trainer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_skipped_update_moves_on_in_the_data_but_does_not_tick(data, model, tmp_path, monkeypatch):
    trainer = Trainer(make_arguments(data, model, tmp_path))
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda accelerator: True))
    trainer.model.train()
    trainer.optimizer_step(iter(trainer.batches))
    assert (trainer.step.global_step, trainer.step.teacher.num_ticks) == (0, 0)
    assert trainer.batches.steps_done == 1
    assert trainer.batches.sampler.position == 2


def test_a_run_in_bfloat16_keeps_weights_in_float32(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, supervision="sim", mixed_precision="bf16", max_steps=2))
    trainer.train()
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in trainer.student.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in trainer.step.teacher.model.parameters())


def test_activation_checkpointing_gives_the_same_run(data, model, tmp_path):
    states = []
    for is_on in (False, True):
        arguments = make_arguments(data, model, tmp_path / str(is_on), max_steps=2, activation_checkpointing=is_on)
        trainer = Trainer(arguments)
        trainer.train()
        states.append(state_of(trainer))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-6)


def test_a_folder_with_checkpoints_is_not_trained_over(data, model, tmp_path):
    Trainer(make_arguments(data, model, tmp_path, max_steps=1)).train()
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(CheckpointError, match=r"already holds checkpoints.*--resume auto"):
        Trainer(make_arguments(data, model, tmp_path, max_steps=1)).train()
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_resume_auto_in_an_empty_folder_starts_from_the_beginning(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, max_steps=1, resume="auto"))
    trainer.train()
    assert trainer.step.global_step == 1


def test_lengths_of_the_schedule_follow_the_run(data, model, tmp_path):
    options = {"supervision": "sim", "max_steps": 4, "checkpoint_every": 0.5, "eval_every": 0.5, "keep_checkpoints": 2}
    trainer = Trainer(make_arguments(data, model, tmp_path, pseudo_start=0.5, eval_limit=1, **options))
    trainer.train()
    assert trainer.step.criterion.mask_criterion.pseudo_start_step == trainer.step.paste_start_step == 2
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000004"]
    assert sorted(path.stem for path in (tmp_path / "pictures").iterdir()) == ["step-000002", "step-000004"]
