"""The method in an unchanged `transformers.Trainer`: a loss function, a callback, and a hook on the model's input.

    adapter = StockTrainerAdapter(step)
    trainer = Trainer(model, args, train_dataset=..., data_collator=adapter.collator(collate),
                      compute_loss_func=adapter.compute_loss, callbacks=[adapter.callback])
    adapter.attach(model)

`args` need `remove_unused_columns=False`; batches are those of docs/architecture.md. What a stock Trainer cannot do, it does
not do here either: `SIMTrainer` counts instances over all micro-batches of a step, evaluates with several processes and
resumes exactly. With the adapter each micro-batch is divided by its own count (over all ranks), and to resume, call
`adapter.load(checkpoint)` before `trainer.train(resume_from_checkpoint=checkpoint)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainingArguments

from sim_hf.training.sharding import refuse_fsdp
from sim_hf.training.state_files import load_state, save_state
from sim_hf.training.step import StepInputs, TrainingStep

TRAINING_STATE = "training_state"
TARGETS = "targets"  # a second name of the labels: the Trainer takes `labels` away before the model sees the batch


class StockTrainerAdapter:
    """Gives a stock Trainer the losses of `step` (see the module)."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.callback = _AdapterCallback(self)
        self.arguments: TrainingArguments | None = None
        self.last_losses: dict[str, float] = {}
        self._inputs: StepInputs | None = None
        self._restored: dict | None = None

    def collator(self, collate: Callable[[Sequence], dict]) -> Callable[[Sequence], dict]:
        """The collator with the labels under a second name, so that they reach the hook."""

        def collate_with_targets(samples: Sequence) -> dict:
            batch = collate(samples)
            return {**batch, TARGETS: batch["labels"]}

        return collate_with_targets

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Prepare every batch (copy-paste changes the pixels) on its way into `model`, the one given to the Trainer."""
        return model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if TARGETS not in kwargs:
            return None  # somebody predicts
        batch = {name: kwargs[name] for name in ("pixel_values", "pixel_mask")}
        self.step.train(module.training)
        self._inputs = self.step.prepare({**batch, "labels": kwargs[TARGETS]})
        rest = {name: value for name, value in kwargs.items() if name not in (*batch, TARGETS)}
        return args, {**rest, **self._inputs.network_inputs(self._inputs.student_prompts_BP4)}

    def compute_loss(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """For `compute_loss_func`. The Trainer leaves the division by the accumulation steps to such a function."""
        inputs, self._inputs = self._inputs, None
        if inputs is None or self.arguments is None:
            raise RuntimeError(
                "the adapter did not see this batch: pass `adapter.collator(...)` as data_collator, `adapter.callback` in "
                "callbacks, and call `adapter.attach(model)`"
            )
        normalizers = self.step.normalizers([inputs])
        with self._autocast(inputs.pixel_values_BCHW.device):
            output = self.step.loss(outputs, inputs, normalizers)
        self.last_losses = {name: float(loss.detach()) for name, loss in output.losses.items()}
        if not self.step.training:
            return output.total.detach()
        # DDP averages over ranks, and the counts are of all ranks together.
        return output.total * (self.arguments.world_size / self.arguments.gradient_accumulation_steps)

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        """The teacher's precision; the Trainer sees to the student's only."""
        if self.arguments is None or not (self.arguments.bf16 or self.arguments.fp16):
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16 if self.arguments.bf16 else torch.float16)

    def load(self, checkpoint: str | Path) -> None:
        """Take student, teacher, prototypes, memory bank and step from a checkpoint when training starts."""
        self._restored = load_state(Path(checkpoint) / TRAINING_STATE)

    def restore(self, model: nn.Module) -> None:
        """Called at the start of training, after the Trainer has loaded what it can (not all of a Swin backbone)."""
        state, self._restored = self._restored, None
        if state is not None:
            model.load_state_dict(state["model"], strict=True)
            self.step.load_training_state(state["step"])

    def save(self, folder: str | Path, model: nn.Module) -> None:
        state: Mapping = {"model": dict(model.state_dict()), "step": self.step.training_state()}
        save_state(Path(folder) / TRAINING_STATE, state)


class _AdapterCallback(TrainerCallback):
    """The rhythm: what ticks once an optimiser step, what is saved with a checkpoint, what is logged."""

    def __init__(self, adapter: StockTrainerAdapter) -> None:
        self.adapter = adapter

    def on_train_begin(self, args, state, control, *, model, **kwargs) -> None:
        refuse_fsdp(args)
        self.adapter.arguments = args
        self.adapter.restore(model)

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs) -> None:
        if optimizer.step_was_skipped:
            self.adapter.step.after_skipped_update()
        else:
            self.adapter.step.after_update(model)

    def on_log(self, args, state, control, *, logs, **kwargs) -> None:
        if "loss" in logs:  # of the last micro-batch of this process
            logs |= self.adapter.last_losses
            state.log_history[-1] |= self.adapter.last_losses

    def on_save(self, args, state, control, *, model, **kwargs) -> None:
        if args.should_save:
            self.adapter.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", model)
