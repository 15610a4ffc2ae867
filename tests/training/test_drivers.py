"""The three drivers: the Accelerate loop, SIMTrainer and a stock transformers.Trainer with the adapter."""

import json

import pytest
import torch
from short_runs import (
    AUGMENTATION,
    STEPS,
    assert_same_state,
    hf_arguments,
    make_samples,
    named_losses,
    sim_trainer,
    stock_trainer,
)
from transformers import Trainer as StockTrainer

from factories import make_arguments, make_step, prime, save_tiny_model, tiny_model, tiny_processor
from sim_hf.data import SeededDataset, StepSampler
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.loaders import train_collator, train_transform
from sim_hf.training.optimizer import build_optimizer, build_scheduler
from sim_hf.training.stock_trainer import StockTrainerAdapter
from sim_hf.training.trainer import Trainer


def run_accelerate_loop(tmp_path, shapes, name):
    model = save_tiny_model(tmp_path / "start")
    trainer = Trainer(
        make_arguments(
            shapes, model, tmp_path / "loop", supervision=name, max_steps=STEPS, lr_schedule="constant", export="student"
        )
    )
    if name == "sim":
        prime(trainer.step)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "loop" / "metrics.jsonl").read_text().splitlines()]
    return trainer.step, trainer.student, named_losses(lines)


def run_sim_trainer(tmp_path, rows, name):
    trainer = sim_trainer(tmp_path / "sim", rows, name=name)
    trainer.train()
    return trainer.step, trainer.student, named_losses(trainer.state.log_history)


def run_stock_trainer(tmp_path, rows, name):
    model = tiny_model()
    step = make_step(model, name, max_steps=STEPS)
    if name == "sim":
        prime(step)
    adapter = StockTrainerAdapter(step)
    seeded = SeededDataset(rows["train"], train_transform(tiny_processor(), AUGMENTATION, with_masks=False), 0)
    stream = iter(StepSampler(len(seeded), 2, seed=0))
    samples = [seeded[key] for _ in range(STEPS) for key in next(stream)]
    optimizer = build_optimizer(model, learning_rate=5e-4, backbone_lr_multiplier=0.2, weight_decay=0.05)
    scheduler = build_scheduler(optimizer, schedule="constant", warmup_steps=0, max_steps=STEPS)
    trainer = StockTrainer(
        model,
        hf_arguments(tmp_path / "stock", remove_unused_columns=False, train_sampling_strategy="sequential"),
        train_dataset=samples,
        data_collator=adapter.collator(train_collator(tiny_processor())),
        compute_loss_func=adapter.compute_loss,
        optimizers=(optimizer, scheduler),
    )
    adapter.attach(trainer)
    trainer.train()
    return step, model, named_losses(trainer.state.log_history)


@pytest.mark.parametrize("name", ["boxinst", "sim"])
def test_three_drivers_give_the_same_losses_weights_and_state(name, tmp_path, shapes, rows):
    runs = [
        run_accelerate_loop(tmp_path, shapes, name),
        run_sim_trainer(tmp_path, rows, name),
        run_stock_trainer(tmp_path, rows, name),
    ]
    reference_step, reference, reference_losses = runs[0]
    assert len(reference_losses) == STEPS
    if name == "sim":
        assert reference_losses[0]["loss_pseudo_mask"] > 0
    for step, model, losses in runs[1:]:
        for found, expected in zip(losses, reference_losses, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for key, tensor in reference.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=1e-6, msg=lambda t, k=key: f"{k}: {t}")
        for key, tensor in reference_step.teacher.state_dict().items():
            torch.testing.assert_close(step.teacher.state_dict()[key], tensor, rtol=0, atol=1e-6)
        assert step.global_step == reference_step.global_step == STEPS
        if name == "sim":
            assert step.memory_bank.image_keys == reference_step.memory_bank.image_keys


def test_trainers_of_transformers_refuse_fsdp(tmp_path, rows, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    model = tiny_model()
    with pytest.raises(ValueError, match="FSDP is not supported here"):
        SIMTrainer(model=model, args=hf_arguments(tmp_path), image_processor=tiny_processor(), train_dataset=rows["train"])
    adapter = StockTrainerAdapter(make_step(model, "boxinst"))
    with pytest.raises(ValueError, match="FSDP is not supported here"):
        adapter.callback.on_train_begin(hf_arguments(tmp_path), None, None, model=model, optimizer=None)


def test_stock_trainer_resumes_a_swin_with_the_adapter(tmp_path, rows):
    samples = make_samples(rows, 8)
    states = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        model = tiny_model("swin")
        step = make_step(model, max_steps=4)
        adapter = StockTrainerAdapter(step)
        trainer = stock_trainer(tmp_path, samples, adapter, model, max_steps=4, save_strategy="steps", save_steps=2)
        if checkpoint is None:
            prime(step)
            trainer.train()
        else:
            adapter.load(checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint))
        states.append({**model.state_dict(), **{f"teacher.{n}": t for n, t in step.teacher.state_dict().items()}})
        assert step.global_step == 4
    assert_same_state(states[1], states[0])


def test_stock_accumulation_averages_the_micro_batches(tmp_path, rows):
    model = tiny_model()
    adapter = StockTrainerAdapter(make_step(model, "boxinst", max_steps=1))
    trainer = stock_trainer(tmp_path, make_samples(rows, 4), adapter, model, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    assert adapter.step.global_step == 1
    losses = []
    for samples in (trainer.train_dataset[:2], trainer.train_dataset[2:]):
        fresh = tiny_model().train()
        step = make_step(fresh, "boxinst", max_steps=1)
        inputs = step.prepare(train_collator(tiny_processor())(samples))
        losses.append(float(step(fresh, inputs, step.normalizers([inputs])).total.detach()))
    logged = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert logged == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_stock_trainer_without_the_hook_is_told_so(tmp_path, rows):
    model = tiny_model()
    adapter = StockTrainerAdapter(make_step(model, "boxinst"))
    trainer = StockTrainer(
        model,
        hf_arguments(tmp_path, remove_unused_columns=False),
        train_dataset=make_samples(rows, 4),
        data_collator=train_collator(tiny_processor()),
        compute_loss_func=adapter.compute_loss,
    )
    with pytest.raises(RuntimeError, match=r"adapter\.attach"):
        trainer.train()
