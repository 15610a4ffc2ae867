"""The method in an unchanged `transformers.Trainer`: a loss function, a callback, and a hook on the model's input.

    adapter = StockTrainerAdapter(step, evaluation=CocoEvaluation(image_processor, rows))
    trainer = Trainer(model, args, train_dataset=..., eval_dataset=..., data_collator=adapter.collator(collate),
                      compute_loss_func=adapter.compute_loss)
    adapter.attach(trainer)
    adapter.load(checkpoint)  # only to resume: before trainer.train(resume_from_checkpoint=checkpoint)
    trainer.train()
    adapter.push_to_hub(trainer, "owner/name", image_processor, supervision="sim")

`args` need `remove_unused_columns=False`; batches are those of docs/architecture.md. Whenever the Trainer evaluates, it measures
the loss on its `eval_dataset`, and the adapter COCO AP of the student on `rows`, shared between the processes; the numbers
are there for trackers and for `metric_for_best_model="eval_segm/AP"`. `SIMTrainer` counts instances over all micro-batches of
a step; here each micro-batch is divided by its own count (over all ranks).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.hub.allowed_files import CARD, MODEL_FILES, allowed_in
from sim_hf.hub.model import REPLACED
from sim_hf.hub.repository import HubRepository
from sim_hf.training.optimizer import make_skips_visible
from sim_hf.training.sharding import refuse_fsdp
from sim_hf.training.state_files import load_state, save_state
from sim_hf.training.step import StepInputs, TrainingStep
from sim_hf.training.trainer_card import card_of_trainer, facts_of_trainer

TRAINING_STATE = "training_state"
_EVALUATED = re.compile(r"\b(eval\w*)_runtime\b")
TARGETS = "targets"  # a second name of the labels: the Trainer takes `labels` away before the model sees the batch


@dataclass(frozen=True)
class CocoEvaluation:
    """What COCO AP is measured on. rows: a data set in the detection convention; ground_truth: a COCO file or dict (default:
    the rows' own boxes)."""

    image_processor: Any
    rows: Any
    ground_truth: Any = None


class StockTrainerAdapter:
    """Gives a stock Trainer the losses of `step` (see the module)."""

    def __init__(self, step: TrainingStep, *, evaluation: CocoEvaluation | None = None) -> None:
        self.step = step
        self.evaluation = evaluation
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

    def attach(self, trainer: Trainer) -> None:
        """Prepare every batch (copy-paste changes the pixels) on its way into the Trainer's model, and listen to the Trainer,
        before its trackers do: they then see what is added to the logs."""
        model: Any = trainer.model
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        trainer.add_callback(self.callback)
        listeners = trainer.callback_handler.callbacks
        listeners.insert(0, listeners.pop())

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if TARGETS not in kwargs:
            return None  # somebody predicts
        batch = {name: kwargs[name] for name in ("pixel_values", "pixel_mask")}
        self.step.train(module.training)
        self._inputs = self.step.prepare({**batch, "labels": kwargs[TARGETS]})
        rest = {name: value for name, value in kwargs.items() if name not in (*batch, TARGETS)}
        return args, {**rest, **self._inputs.student_inputs()}

    def compute_loss(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """For `compute_loss_func`. The Trainer leaves the division by the accumulation steps to such a function."""
        inputs, self._inputs = self._inputs, None
        if inputs is None or self.arguments is None:
            raise RuntimeError(
                "the adapter did not see this batch: pass `adapter.collator(...)` as data_collator, and call "
                "`adapter.attach(trainer)`"
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

    def measure(self, model: nn.Module, args: TrainingArguments) -> dict[str, float]:
        """COCO numbers of the student, each process on its share of the images."""
        if self.evaluation is None:
            return {}
        measured, _ = evaluate_model(
            model,
            self.evaluation.image_processor,
            self.evaluation.rows,
            self.evaluation.ground_truth,
            batch_size=args.per_device_eval_batch_size,
            process_index=args.process_index,
            num_processes=args.world_size,
            progress=None,
        )
        return {name: value for name, value in measured.items() if value is not None}

    def push_to_hub(
        self,
        trainer: Trainer,
        repo_id: str,
        image_processor: Any,
        *,
        supervision: str,
        used_masks: bool = False,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        message: str = "End of training",
        **card_options: Any,
    ) -> CommitInfo | None:
        """The student, its processor and a card, in one commit, from the main process. The Trainer's own `push_to_hub` uploads
        whatever lies in its output folder. card_options: as for `Trainer.create_model_card`."""
        if not trainer.is_world_process_zero():
            return None
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        eval_rows = self.evaluation.rows if self.evaluation else None
        facts = facts_of_trainer(
            trainer, trainer.train_dataset, eval_rows, supervision=supervision, used_masks=used_masks or supervision == "full"
        )
        card = card_of_trainer(model, repo_id, facts, **card_options)
        repository = HubRepository(repo_id, private=private, revision=revision, token=token)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            image_processor.save_pretrained(folder)
            files = {**allowed_in(folder, MODEL_FILES), CARD: str(card).encode()}
            return repository.commit(files, message, replaces=REPLACED)

    def save(self, folder: str | Path, model: nn.Module) -> None:
        state: Mapping = {"model": dict(model.state_dict()), "step": self.step.training_state()}
        save_state(Path(folder) / TRAINING_STATE, state)


class _AdapterCallback(TrainerCallback):
    """The rhythm: what ticks once an optimiser step, what is measured, what is saved with a checkpoint, what is logged."""

    def __init__(self, adapter: StockTrainerAdapter) -> None:
        self.adapter = adapter

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs) -> None:
        refuse_fsdp(args)
        make_skips_visible(optimizer.optimizer)  # inside Accelerate's
        self.adapter.arguments = args
        self.adapter.restore(model)
        step = self.adapter.step.global_step
        if state.global_step != step:
            raise RuntimeError(
                f"the Trainer goes on at step {state.global_step}, the teacher and prototypes at {step}: "
                "call adapter.load(checkpoint) before trainer.train(resume_from_checkpoint=checkpoint)"
            )

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs) -> None:
        if optimizer.step_was_skipped:
            self.adapter.step.after_skipped_update()
        else:
            self.adapter.step.after_update(model)

    def on_log(self, args, state, control, *, logs, model, **kwargs) -> None:
        added = {}
        if "loss" in logs:  # of the last micro-batch of this process
            added = self.adapter.last_losses
        elif evaluated := _EVALUATED.search(" ".join(logs)):
            added = {f"{evaluated[1]}_{name}": value for name, value in self.adapter.measure(model, args).items()}
        logs |= added
        state.log_history[-1] |= added

    def on_save(self, args, state, control, *, model, **kwargs) -> None:
        if args.should_save:
            self.adapter.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", model)

    def on_train_end(self, args, state, control, *, model, **kwargs) -> None:
        """The best model whole: what the Trainer has loaded lacks most of a Swin backbone, whose names on disk differ."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = load_state(Path(state.best_model_checkpoint) / TRAINING_STATE)
            model.load_state_dict(best["model"], strict=True)
