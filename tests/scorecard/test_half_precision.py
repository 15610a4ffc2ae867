"""06, 07, 25: what half precision does to transport, teacher and skipped updates; on CUDA where there is one."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from factories import make_arguments, prime
from sim_hf.mask_generation import sinkhorn_assignment
from sim_hf.training.teacher import EMATeacher
from sim_hf.training.trainer import Trainer


def transport_agrees(device, dtype):
    """Similarities near 1, where exp(s / 0.05) is far beyond what float16 holds."""
    generator = torch.Generator().manual_seed(0)
    similarity_KML = (0.9 + 0.1 * torch.rand(2, 500, 10, generator=generator)).to(dtype)
    found = sinkhorn_assignment(similarity_KML.to(device)).cpu().double()
    expected = sinkhorn_assignment(similarity_KML.double()).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 500, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_06_transport_on_this_device(dtype):
    transport_agrees("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_06_transport_on_cuda(dtype):
    transport_agrees("cuda", dtype)
    with torch.autocast("cuda", dtype):
        transport_agrees("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_07_teacher_on_cuda(dtype):
    student = nn.Linear(3, 2).to("cuda", dtype)
    nn.init.ones_(student.weight)
    teacher = EMATeacher(student, momentum=0.9999, warm_start=False)
    nn.init.zeros_(student.weight)
    for _ in range(1000):
        teacher.tick(student)
    assert (teacher.model.weight.double() - 0.9999**1000).abs().max() < 1e-6


def nothing_but_the_scale_moves_in_an_overflow(trainer, scaler):
    prime(trainer.step)
    trainer.model.train()
    trainer.step.train()
    stream = iter(trainer.batches)

    def snapshot():
        state = {"student": trainer.student.state_dict(), "step": trainer.step.training_state()}
        return copy.deepcopy({**state, "optimizer": trainer.optimizer.state_dict(), "schedule": trainer.scheduler.state_dict()})

    before, scale = snapshot(), scaler.get_scale()
    trainer.optimizer_step(stream)
    assert trainer.accelerator.optimizer_step_was_skipped and scaler.get_scale() < scale
    after = snapshot()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (trainer.step.global_step, trainer.step.teacher.num_ticks, trainer.batches.steps_done) == (0, 0, 1)
    trainer.optimizer_step(stream)
    assert not trainer.accelerator.optimizer_step_was_skipped
    assert (trainer.step.global_step, trainer.step.teacher.num_ticks, trainer.batches.steps_done) == (1, 1, 2)


def test_25_a_real_scaler_skips_everything(data, model, tmp_path, monkeypatch):
    """Accelerate gives the CPU no scaler; torch has one, and here it scales the losses of a float32 run beyond their range."""
    trainer = Trainer(make_arguments(data, model, tmp_path, supervision="sim"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-110)
    accelerator = trainer.accelerator
    accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = scaler, True, "fp16"
    monkeypatch.setattr(accelerator, "autocast", nullcontext)
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, device_placement=False, scaler=scaler)
    accelerator._optimizers = [trainer.optimizer]
    nothing_but_the_scale_moves_in_an_overflow(trainer, scaler)


@pytest.mark.gpu
def test_25_fp16_on_cuda(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, supervision="sim", mixed_precision="fp16"))
    scaler = trainer.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60, "backoff_factor": 2.0**-50})
    nothing_but_the_scale_moves_in_an_overflow(trainer, scaler)
