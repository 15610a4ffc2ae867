"""Accelerate, `transformers.Trainer`, `from_pretrained` and torch under the faults of training."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, DataLoader
from transformers import (
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from factories import tiny_config
from killing import in_child, kill_at_file_operation


def killed_while_saving(folder: Path) -> str:
    lost = number = 0
    for number in range(1, 300):
        shutil.rmtree(folder / "run", ignore_errors=True)
        AcceleratorState._reset_state(True)
        project = ProjectConfiguration(str(folder / "run"), automatic_checkpoint_naming=True, total_limit=1)
        accelerator = Accelerator(cpu=True, project_config=project)
        model = nn.Linear(8, 8)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        accelerator.save_state()

        def save(number=number, accelerator=accelerator) -> None:
            kill_at_file_operation(number, folder / "run")
            accelerator.save_state()

        status = in_child(save)
        try:
            accelerator.load_state()
        except Exception:
            lost += 1
        if status == 0:
            break
    return f"Accelerate's `save_state` with `total_limit=1` leaves nothing that loads after {lost} of {number - 1} kills"


def resumed_in_the_middle_of_an_epoch(folder: Path) -> str:
    def prepared():
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True)
        return accelerator, accelerator.prepare(DataLoader(list(range(16)), batch_size=4, shuffle=True))

    torch.manual_seed(0)
    accelerator, loader = prepared()
    list(loader)
    stream = iter(loader)
    seen = [value for _ in range(2) for value in next(stream).tolist()]
    accelerator.save_state(folder)
    expected = [value for batch in stream for value in batch.tolist()]
    accelerator, loader = prepared()
    accelerator.load_state(folder)
    found = [value for batch in accelerator.skip_first_batches(loader, 2) for value in batch.tolist()]
    never = len(set(range(16)) - {*seen, *found})
    order = "the same order" if found == expected else "another order"
    return f"Accelerate goes on in {order}; {never} of 16 samples of the epoch are never seen, as many twice"


class _Scaled(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((4096,), 2.0), persistent=False)
        self.post_init()


def loaded_on_a_dirty_heap(folder: Path) -> str:
    _Scaled(PreTrainedConfig()).save_pretrained(folder)
    for _ in range(50):
        torch.full((4096,), 1234.5)
    wrong = int((_Scaled.from_pretrained(folder).scale != 2).sum())
    return f"`from_pretrained` gives a buffer that is not in the file with {wrong} of 4096 values wrong, without a word"


class _Line(nn.Module):
    """Regresses the mean of an image's boxes; the loss is the mean over the boxes of a batch. NaN at step `nan_at`."""

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.nan_at, self.calls = nan_at, 0

    def forward(self, pixel_values=None, labels=None):
        self.calls += 1
        boxes = torch.cat([label["boxes"] for label in labels])
        loss = ((self.weight - boxes) ** 2).sum() / max(len(boxes), 1)
        return {"loss": loss * (float("nan") if self.calls == self.nan_at else 1)}


class _At(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **options):
        if state.global_step == self.step:
            self.action()


def _trainer(folder: Path, model=None, callbacks=(), **options) -> Trainer:
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    counts = [0, 1, 1, 8, 0, 0, 2, 20]
    rows = [{"pixel_values": torch.zeros(1), "labels": {"boxes": torch.randn(n) + 3}} for n in counts]
    values = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, **values
    )

    def collate(batch):
        return {"pixel_values": torch.stack([row["pixel_values"] for row in batch]), "labels": [row["labels"] for row in batch]}

    return Trainer(model or _Line(), arguments, data_collator=collate, train_dataset=rows, callbacks=list(callbacks))


def nan_in_a_step(folder: Path) -> str:
    model = _Line(nan_at=2)
    trainer = _trainer(folder, model)
    trainer.train()
    losses = [round(line["loss"], 2) for line in trainer.state.log_history if "loss" in line]
    return f"Trainer runs to its end and logs {losses}; the weights are {'finite' if model.weight.isfinite() else 'NaN'}"


def accumulated(folder: Path) -> str:
    weights = []
    for size, accumulation in ((8, 1), (1, 8)):
        model = _Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = _trainer(folder, model, max_grad_norm=0, **options)
        trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer.train()
        weights.append(float(model.weight))
    return f"Trainer's weight after one step is {weights[0]:.2f} with one batch of 8 and {weights[1]:.2f} with 8 of one"


def sinkhorn_as_published(folder: Path) -> str:
    similarity = torch.linspace(0.9, 1.0, 40).reshape(8, 5).half()
    transport = torch.exp(similarity / 0.05).T
    transport /= transport.sum()
    return f"the published form, exp(s / 0.05), has {int((~transport.isfinite()).sum())} of 40 values not finite in float16"


def averaged_in_bfloat16(folder: Path) -> str:
    student = nn.Linear(1, 1).bfloat16()
    nn.init.ones_(student.weight)
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    teacher.update_parameters(student)
    nn.init.zeros_(student.weight)
    for _ in range(1000):
        teacher.update_parameters(student)
    mean, expected = float(teacher.module.weight), 0.9999**1000
    return f"torch's AveragedModel in bfloat16 is {mean:.4f} after 1000 steps instead of {expected:.4f}"


def shared_by_two_ranks(folder: Path) -> str:
    shards = [BatchSamplerShard(BatchSampler(range(7), 2, drop_last=False), 2, rank) for rank in range(2)]
    served = sum(len(batch) for shard in shards for batch in shard)
    return f"Accelerate's loaders serve {served} images for 7 (`gather_for_metrics` removes the repeats, for tensors)"


def key_that_is_missing(folder: Path) -> str:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.startswith("classifier") and name.endswith("weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    ResNetForImageClassification.from_pretrained(folder)
    return "`from_pretrained` prints a table and goes on with random weights in the place of missing ones"


def state_that_is_gone(folder: Path) -> str:
    _trainer(folder, save_strategy="steps", save_steps=2).train()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / "checkpoint-2" / name).unlink()
    model = _Line()
    model.load_state_dict(_Line().state_dict())
    _trainer(folder, model).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return "Trainer resumes without a word when optimiser, schedule and random state are deleted"


def full_disk(folder: Path) -> str:
    file = folder / "state.pt"
    torch.save({"a": torch.ones(4)}, file)
    state = {"a": torch.ones(50_000)}

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        torch.save(state, file)

    in_child(save)
    try:
        torch.load(file)
    except Exception as error:
        return f"`torch.save` over an older file destroys it ({type(error).__name__} when it is read)"
    return "`torch.save` leaves the older file"


def told_to_end(folder: Path) -> str:
    trainer = _trainer(folder, save_strategy="steps", save_steps=3)
    trainer.add_callback(_At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    status = in_child(trainer.train)
    how = f"ends by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exits with {os.waitstatus_to_exitcode(status)}"
    return f"Trainer {how} with {len(list(folder.glob('checkpoint-*')))} checkpoints of the 2 steps made"


def batches_without_objects(folder: Path) -> str:
    network = Mask2FormerForUniversalSegmentation(tiny_config())
    found = []
    for name, count in (("no instance", 0), ("more instances than queries", network.config.num_queries + 5)):
        masks_GHW, labels_G = torch.ones(count, 64, 64), torch.zeros(count, dtype=torch.long)
        try:
            loss = network(torch.zeros(1, 3, 64, 64), mask_labels=[masks_GHW], class_labels=[labels_G]).loss
            loss.backward()
            found.append(f"{name}: a loss of {float(loss):.1f}")
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}")
    return f"transformers' Mask2Former, {', '.join(found)}"


class _Counting(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **options):
        self.steps += 1


def skipped_updates(folder: Path) -> str:
    counting = _Counting()
    trainer = _trainer(folder, callbacks=[counting])
    with mock.patch.object(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda accelerator: True)):
        trainer.train()
    steps = trainer.state.global_step
    return (
        f"Trainer counts 4 skipped updates as {steps} steps and calls `on_step_end`, where averages tick, {counting.steps} times"
    )


class _OutOfMemory(_Line):
    def forward(self, pixel_values=None, labels=None):
        output = super().forward(pixel_values, labels)
        if self.calls == 2:
            raise torch.OutOfMemoryError("out of memory")
        return output


def memory_in_the_middle_of_a_step(folder: Path) -> str:
    model = _OutOfMemory()
    try:
        _trainer(folder, model, gradient_accumulation_steps=4).train()
        said = "goes on"
    except torch.OutOfMemoryError:
        said = "raises torch's error as it is"
    kept = "keeps" if model.weight.grad is not None else "drops"
    return f"Trainer {said} and {kept} the gradients of the half step"


def three_hundred_steps(folder: Path) -> str:
    trainer = _trainer(folder, max_steps=300, save_strategy="steps", save_steps=300)
    trainer.train()
    kilobytes = (folder / "checkpoint-300" / "trainer_state.json").stat().st_size / 1000
    lines = len(trainer.state.log_history)
    return f"Trainer keeps all {lines} lines of its log in memory and writes them into every checkpoint ({kilobytes:.0f} kB)"


class _Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def evil_pickle(folder: Path) -> str:
    (folder / "model.pt").write_bytes(pickle.dumps(_Evil(folder / "canary")))
    found = []
    for name, options in (("`torch.load`", {}), ("`torch.load(weights_only=False)`", {"weights_only": False})):
        try:
            torch.load(folder / "model.pt", **options)
        except Exception as error:
            outcome = f"refuses it ({type(error).__name__})" if not (folder / "canary").exists() else "runs it"
        else:
            outcome = "runs it" if (folder / "canary").exists() else "reads it"
        found.append(f"{name} {outcome}")
    return ", ".join(found)


MEASUREMENTS = {
    1: killed_while_saving,
    2: resumed_in_the_middle_of_an_epoch,
    3: loaded_on_a_dirty_heap,
    4: nan_in_a_step,
    5: accumulated,
    6: sinkhorn_as_published,
    7: averaged_in_bfloat16,
    14: shared_by_two_ranks,
    16: key_that_is_missing,
    17: state_that_is_gone,
    18: batches_without_objects,
    19: full_disk,
    25: skipped_updates,
    26: memory_in_the_middle_of_a_step,
    27: told_to_end,
    29: three_hundred_steps,
    31: evil_pickle,
}
