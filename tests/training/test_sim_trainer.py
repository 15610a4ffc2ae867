"""SIMTrainer: the step does not depend on how it is split, is stopped or skipped whole, and is logged and measured right."""

import math

import pytest
import torch
from short_runs import hf_arguments, named_losses, sim_trainer

from factories import tiny_model, tiny_processor
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.training.finite import NonFiniteLossError
from sim_hf.training.hf_trainer import SIMTrainer


def test_sim_trainer_gives_the_same_weights_for_every_split_of_a_step(tmp_path, rows):
    runs = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = sim_trainer(
            tmp_path / str(size),
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            adam_epsilon=1.0,  # or Adam would blow up the rounding of gradients near zero
            learning_rate=1e-2,
        )
        trainer.train()
        assert trainer.step.global_step == trainer.step.teacher.num_ticks == 2
        runs.append(trainer)
    reference = runs[0]
    for trainer in runs[1:]:
        for found, expected in zip(trainer.state.log_history[:2], reference.state.log_history[:2], strict=True):
            names = [name for name in expected if name in ("loss", "grad_norm", "step") or name.startswith("loss_")]
            assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-4)
        for name, tensor in reference.student.state_dict().items():
            found = trainer.student.state_dict()[name]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_sim_trainer_logs_every_loss_and_they_add_up(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, logging_steps=2, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    terms = {"loss_cross_entropy", "loss_projection", "loss_pairwise", "loss_pseudo_mask", "loss_paste"}
    assert terms <= line.keys()
    assert sum(value for name, value in line.items() if name.startswith("loss_")) == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sim_trainer_stops_before_the_update_when_a_loss_is_not_finite(value, tmp_path, rows, monkeypatch):
    trainer = sim_trainer(tmp_path, rows, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    loss = trainer.step.loss
    before = {}

    def poisoned(*args):
        output = loss(*args)
        if trainer.step.global_step == 1:
            before.setdefault("state", {n: t.clone() for n, t in trainer.student.state_dict().items()})
            before.setdefault("teacher", {n: t.clone() for n, t in trainer.teacher.state_dict().items()})
            output.losses["loss_projection"] = output.losses["loss_projection"] * value
        return output

    monkeypatch.setattr(trainer.step, "loss", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*loss_projection.*images \[\d, \d, \d, \d\]"):
        trainer.train()
    assert all(torch.equal(tensor, before["state"][name]) for name, tensor in trainer.student.state_dict().items())
    assert all(torch.equal(tensor, before["teacher"][name]) for name, tensor in trainer.teacher.state_dict().items())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_skipped_update_does_not_tick(tmp_path, rows, monkeypatch):
    trainer = sim_trainer(tmp_path, rows, max_steps=2)
    images = trainer.step.memory_bank.image_keys
    skipped = property(lambda accelerator: True)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.train()
    assert (trainer.step.global_step, trainer.step.teacher.num_ticks) == (0, 0)
    assert trainer.step.memory_bank.image_keys == images


def test_sim_trainer_trains_in_bfloat16(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, bf16=True, max_steps=1)
    trainer.train()
    assert all(math.isfinite(value) for value in named_losses(trainer.state.log_history)[0].values())
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in trainer.student.parameters())


def test_epochs_cover_the_data_set_in_whole_steps(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, name="boxinst", max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    seen = []
    prepare = trainer.step.prepare
    trainer.step.prepare = lambda batch: seen.append([int(label["image_id"]) for label in batch["labels"]]) or prepare(batch)
    trainer.train()
    images = [image for batch in seen for image in batch]
    assert trainer.step.global_step == 4  # 7 images, 4 a step
    assert len(images) == 16
    assert sorted(images[:7]) == sorted(images[7:14]) == list(range(1, 8))  # an epoch ends inside a step


def test_evaluation_gives_the_numbers_of_evaluate_model(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows)
    expected, _ = evaluate_model(trainer.teacher.model, tiny_processor(), rows["val"], progress=None)
    found = trainer.evaluate()
    assert {name: found[f"eval_{name}"] for name, value in expected.items() if value is not None} == {
        name: value for name, value in expected.items() if value is not None
    }
    several = trainer.evaluate({"a": rows["val"], "b": rows["val"]})
    assert several["eval_a_bbox/AP"] == several["eval_b_bbox/AP"] == found["eval_bbox/AP"]


def test_several_gpus_in_one_process_are_refused(tmp_path, rows):
    arguments = hf_arguments(tmp_path)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="one process for each"):
        SIMTrainer(model=tiny_model(), args=arguments, image_processor=tiny_processor(), train_dataset=rows["train"])
