"""26 oom: memory runs out in the forward pass, the backward pass, or while a batch is made."""

from contextlib import suppress

import pytest
import torch

from factories import make_arguments
from sim_hf.cli import main
from sim_hf.training.out_of_memory import explained
from sim_hf.training.trainer import Trainer


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail_at(trainer, place, error):
    """From the second micro-batch of the second step on, `place` has no memory left."""
    loss, calls = trainer.step.loss, []

    def short_of_memory(*arguments):
        calls.append(1)
        output = loss(*arguments)
        if len(calls) >= 4:
            if place == "forward":
                raise error
            output.losses["loss_projection"] = _FailingBackward.apply(output.losses["loss_projection"])
        return output

    def without_memory(batch):
        if trainer.step.global_step >= 1:
            raise error
        return collate(batch)

    if place == "batch":
        collate, trainer.batches.loader.collate_fn = trainer.batches.loader.collate_fn, without_memory
    else:
        trainer.step.loss = short_of_memory


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    "python": MemoryError(),
}


OPTIONS = {"supervision": "sim", "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}


@pytest.fixture(scope="module")
def one_step(data, model, tmp_path_factory):
    """A run that was stopped after the step before."""
    trainer = Trainer(make_arguments(data, model, tmp_path_factory.mktemp("one"), **OPTIONS, stop_after=1))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("place", "kind"), [("forward", "cuda"), ("forward", "cpu"), ("backward", "cuda"), ("batch", "python")])
def test_26_nothing_is_half_applied_and_the_way_out_is_named(place, kind, data, model, one_step, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, **OPTIONS))
    fail_at(trainer, place, ERRORS[kind])
    with pytest.raises(torch.OutOfMemoryError, match=r"step 1: out of memory.*--gradient_accumulation_steps 4"):
        trainer.train()
    assert (trainer.step.global_step, trainer.step.teacher.num_ticks) == (1, 1)
    assert all(parameter.grad is None for parameter in trainer.student.parameters())
    assert trainer.step.memory_bank._staged == [] and trainer.step.prototype_bank.commit() is None
    for name, tensor in one_step.student.state_dict().items():
        assert torch.equal(trainer.student.state_dict()[name], tensor), name
    for name, tensor in one_step.step.training_state()["criterion"].items():
        assert torch.equal(trainer.step.training_state()["criterion"][name], tensor), name


def test_26_the_run_goes_on_in_smaller_parts(data, model, tmp_path):
    options = {"supervision": "sim", "batch_size": 4, "max_steps": 3}
    whole = Trainer(make_arguments(data, model, tmp_path / "whole", **options))
    whole.train()
    Trainer(make_arguments(data, model, tmp_path / "parts", **options, stop_after=1)).train()
    smaller = {**options, "gradient_accumulation_steps": 4, "activation_checkpointing": True, "resume": "auto"}
    resumed = Trainer(make_arguments(data, model, tmp_path / "parts", **smaller))
    resumed.train()
    assert resumed.step.global_step == 3
    for name, tensor in whole.student.state_dict().items():  # the same steps, up to rounding (which Adam enlarges)
        torch.testing.assert_close(resumed.student.state_dict()[name], tensor, rtol=0, atol=2e-3)


@pytest.mark.gpu
def test_26_memory_that_really_runs_out_on_cuda(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, **OPTIONS))
    trainer.model.train()
    trainer.step.train()
    trainer.optimizer_step(iter(trainer.batches))
    before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    filled = []
    try:
        for size in (2**20, 2**18, 2**14, 2**10, 2**7):  # until nothing fits between the others
            with suppress(torch.OutOfMemoryError):
                while True:
                    filled.append(torch.empty(size, device="cuda"))
        with (
            pytest.raises(torch.OutOfMemoryError, match=r"step 1: out of memory.*--gradient_accumulation_steps 4"),
            explained(trainer.step, trainer.optimizer, trainer.run),
        ):
            trainer.optimizer_step(iter(trainer.batches))
    finally:
        filled.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(parameter.grad is None for parameter in trainer.student.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.student.state_dict().items())
    trainer.optimizer_step(iter(trainer.batches))
    assert trainer.step.global_step == 2


def test_26_the_command_ends_in_one_line(command, tmp_path, monkeypatch, capsys):
    def without_memory(self, *arguments):
        raise MemoryError

    monkeypatch.setattr("sim_hf.training.step.TrainingStep.loss", without_memory)
    assert main(command(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "step 0: out of memory" in error and "Traceback" not in error


def test_26_other_errors_stay_what_they_are(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path))
    trainer.step.loss = lambda *arguments: [][0]
    with pytest.raises(IndexError):
        trainer.train()
