"""`SIMTrainer`: the method inside `transformers.Trainer`, for everybody who lives there.

The losses come from the same `TrainingStep` as in the Accelerate loop, on the same stream of images. Where the stock Trainer
would go wrong, a method is overridden, and says why.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints, speed_metrics
from transformers.training_args import OptimizerNames

from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.models.architectures import InstanceSegmenter
from sim_hf.structures import CriterionOutput
from sim_hf.training.arguments import DataArguments, RunArguments, SupervisionArguments
from sim_hf.training.assembly import build_step
from sim_hf.training.checkpoint import verify, write_manifest
from sim_hf.training.finite import check_finite, sum_over_ranks
from sim_hf.training.hub_trainer import PushesWithCard
from sim_hf.training.loaders import epoch_loader
from sim_hf.training.optimizer import build_optimizer
from sim_hf.training.sharding import refuse_fsdp
from sim_hf.training.state_files import CheckpointError, load_state, save_state
from sim_hf.training.step import StepInputs
from sim_hf.training.step_diagnostics import step_diagnostics
from sim_hf.training.teacher import EMATeacher

logger = logging.getLogger(__name__)

TRAINING_STATE = "training_state"
_OPTIMIZERS = {
    OptimizerNames.ADAMW_TORCH: "adamw",
    OptimizerNames.ADAMW_TORCH_FUSED: "adamw",
    OptimizerNames.SGD: "sgd",
}
_OPTIMIZER_OPTIONS = ("betas", "eps", "momentum", "dampening", "nesterov")  # of `args` and `args.optim_args`


class SIMTrainer(PushesWithCard):
    """`transformers.Trainer` with the losses, the teacher, the evaluation, the exact resume and the card of this package.

    train_dataset, eval_dataset: rows in the detection convention (`load_coco`, `load_detection_dataset`); transform and
    collator are made here. With a `data_collator` of your own, `train_dataset` must give what it takes, and it the batch of
    docs/architecture.md (and `args.remove_unused_columns` must be False). augmentation: the fields of `DataArguments` about
    scale, mosaic, flip, colour and `use_masks`. eval_ground_truth: a COCO file to measure against (default: the rows' own).
    export: which weights are evaluated and saved as the model, "teacher" (EMA) or "student".

    A checkpoint folder holds the exported weights, ready for `from_pretrained`, in `training_state.*` the student and
    everything else that training needs, and in `manifest.json` the sha256 of every file.
    """

    # compute_loss divides by the counts of the whole step, so nothing may be divided by the accumulation steps again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: InstanceSegmenter,
        args: TrainingArguments,
        *,
        supervision: SupervisionArguments | None = None,
        image_processor: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        augmentation: DataArguments | None = None,
        eval_ground_truth: Any = None,
        backbone_lr_multiplier: float = 0.2,
        export: str = "teacher",
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        if export not in ("teacher", "student"):
            raise ValueError(f"export must be 'teacher' or 'student', got {export!r}")
        if supervision is not None and supervision.second_phase != 1:
            raise ValueError("only `sim-hf train` has a second phase; leave SupervisionArguments.second_phase at 1")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process; start one process for each (torchrun or accelerate launch), "
                "or show one with CUDA_VISIBLE_DEVICES=0"
            )
        refuse_fsdp(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            callbacks=[_StepEnd(self), *(callbacks or [])],
            **options,
        )
        self.student = model  # the network without wrappers
        self.train_rows = train_dataset
        self.supervision = supervision or SupervisionArguments()
        self.image_processor = image_processor
        self.augmentation = augmentation or DataArguments()
        self.has_own_collator = data_collator is not None
        self.eval_ground_truth = eval_ground_truth
        self.backbone_lr_multiplier = backbone_lr_multiplier
        self.export = export
        run = RunArguments(max_steps=self._planned_steps(), seed=args.seed)
        self.step = build_step(model, image_processor, self.supervision, run).to(args.device)
        self._normalizers = None
        self._step_inputs: list[StepInputs] = []
        self._last_output: tuple[StepInputs, CriterionOutput] | None = None
        self._step_losses: dict[str, float] = {}
        self._losses_since_log: dict[str, float] = {}
        self._steps_since_log = 0

    @property
    def exported(self) -> nn.Module:
        """The network that is evaluated and saved."""
        return self.teacher.model if self.export == "teacher" else self.student

    @property
    def teacher(self) -> EMATeacher:
        assert isinstance(self.step.teacher, EMATeacher)  # build_step makes one
        return self.step.teacher

    def _planned_steps(self) -> int:
        """Optimiser steps of the whole run: the schedule of the supervision is made of fractions of it."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        if self.train_rows is None:
            return 1
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return max(1, math.ceil(self.args.num_train_epochs * math.ceil(len(self.train_rows) / per_step)))

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """The stream of the Accelerate loop. Not prepared by accelerate, which would shard it a second time and cannot
        gather lists of boxes."""
        if self.train_rows is None:
            raise ValueError("training needs a train_dataset")
        if self.has_own_collator:
            return super().get_train_dataloader()
        return epoch_loader(
            self.train_rows,
            self.augmentation,
            self.image_processor,
            with_masks=self.supervision.supervision == "full" or self.augmentation.use_masks,
            batch_size=self.args.train_batch_size,
            num_micro=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            num_processes=self.args.world_size,
            process_index=self.args.process_index,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Read, prepare and count all micro-batches of an optimiser step before the first forward: the losses are divided by
        the instances of the whole step, pasted ones included."""
        inputs = []
        for _, batch in zip(range(num_batches), epoch_iterator, strict=False):
            inputs.append(self.step.prepare(self._prepare_inputs(batch)))
        if not inputs:
            return [], None
        self._normalizers = self.step.normalizers(inputs)
        self._step_inputs = inputs
        self._step_losses = {}
        return [{"pixel_values": x.pixel_values_BCHW, "prepared": x} for x in inputs], None

    # ---- the step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The losses of one micro-batch, which summed over the micro-batches and ranks are those of the step."""
        if return_outputs:
            raise ValueError("SIMTrainer.compute_loss gives no outputs; use sim_hf.evaluation to predict")
        with self.accelerator.autocast():  # the teacher too
            output = self.step(model, inputs["prepared"], self._normalizers)
        self._last_output = (inputs["prepared"], output)
        for name, loss in output.losses.items():
            self._step_losses[name] = self._step_losses.get(name, 0.0) + float(loss.detach())
        # DDP averages over ranks, and the counts are of all ranks together.
        return output.total * self.args.world_size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last stop before the update, on every rank: nothing that is not finite goes further."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        own, self._step_losses = self._step_losses, sum_over_ranks(self._step_losses, self.accelerator)
        step = self.step.global_step
        check_finite(self._step_losses, own, float(grad_norm), self._step_inputs, step=step, accelerator=self.accelerator)
        return grad_norm

    def finish_step(self) -> None:
        """After the update: what ticks once a step (and not on one that fp16 skipped)."""
        if self.accelerator.optimizer_step_was_skipped:
            self.step.after_skipped_update()
        else:
            self.step.after_update(self.student)
        for name, value in self._step_losses.items():
            self._losses_since_log[name] = self._losses_since_log.get(name, 0.0) + value
        self._steps_since_log += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every named loss, mean since the last line, and the diagnostics of the last micro-batch to the Trainer's own."""
        if "loss" in logs and self._steps_since_log:
            logs |= {name: value / self._steps_since_log for name, value in self._losses_since_log.items()}
            if self._last_output is not None:
                logs |= step_diagnostics(*self._last_output)
            self._losses_since_log, self._steps_since_log = {}, 0
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW and SGD get the groups of the Accelerate loop (slower backbone); other optimisers are the stock Trainer's."""
        optimizer = _OPTIMIZERS.get(OptimizerNames(self.args.optim))
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None or optimizer is None:
            return super().create_optimizer(model)
        self.optimizer = build_optimizer(
            self.student if model is None else model,
            optimizer=optimizer,
            learning_rate=self.args.learning_rate,
            backbone_lr_multiplier=self.backbone_lr_multiplier,
            weight_decay=self.args.weight_decay,
        )
        _, options = self.get_optimizer_cls_and_kwargs(self.args, self.student)
        for group in self.optimizer.param_groups:
            group |= {name: options[name] for name in _OPTIMIZER_OPTIONS if name in options}
        return self.optimizer

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """COCO numbers of the exported network, each rank on its share of the images. The stock loop would gather lists of
        boxes of different lengths, which hangs."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, Mapping):
            metrics: dict[str, float] = {}
            for name, part in rows.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if rows is None:
            raise ValueError("evaluation needs an eval_dataset")
        started = time.time()
        measured, evaluator = evaluate_model(
            self.exported,
            self.image_processor,
            rows,
            self.eval_ground_truth,
            batch_size=self.args.per_device_eval_batch_size,
            process_index=self.args.process_index,
            num_processes=self.args.world_size,
            progress=None if self.args.disable_tqdm else "evaluate",
        )
        if evaluator.note and self.is_world_process_zero():
            logger.warning(evaluator.note)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items() if value is not None}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(rows))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("use sim_hf.evaluation.prediction.predict_rows(trainer.exported, ...): masks differ in number")

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`resume_from_checkpoint=True` takes the newest checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_complete_checkpoint()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_complete_checkpoint(self) -> str:
        folders = sort_checkpoints(str(self.args.output_dir), use_mtime=False)
        for folder in reversed(folders):
            problems = verify(folder)
            if not problems:
                return folder
            logger.warning("skipping checkpoint %s: %s", Path(folder).name, "; ".join(problems))
        raise CheckpointError(f"no complete checkpoint among the {len(folders)} of {self.args.output_dir}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The manifest is written last, when every rank has written its files: a folder whose manifest verifies is complete.
        Only then do older ones go."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial))
            if not self.args.save_only_model:
                checkpoint = folder / f"checkpoint-{self.state.global_step}"
                state = {"model": dict(self.student.state_dict()), "step": self.step.training_state()}
                save_state(checkpoint / TRAINING_STATE, state)
                write_manifest(checkpoint, {"step": self.state.global_step})
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The exported weights under the model's name: what `from_pretrained` and the Hub give is what was evaluated."""
        super()._save(output_dir, self.exported.state_dict() if state_dict is None else state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Everything, strictly. The stock method matches names on disk with names in memory, which differ for Swin: half
        of the backbone would silently keep what it was."""
        if problems := verify(resume_from_checkpoint):
            raise CheckpointError(f"{Path(resume_from_checkpoint).name} cannot be used: " + "; ".join(problems))
        state = load_state(Path(resume_from_checkpoint) / TRAINING_STATE)
        self.student.load_state_dict(state["model"], strict=True)
        self.step.load_training_state(state["step"])

    def _load_best_model(self) -> None:
        """The weights of the best checkpoint, through `from_pretrained` (see `_load_from_checkpoint`), strictly."""
        best = type(self.student).from_pretrained(self.state.best_model_checkpoint, dtype=torch.float32)
        self.student.load_state_dict(best.state_dict(), strict=True)
        self.teacher.model.load_state_dict(best.state_dict(), strict=True)


class _StepEnd(TrainerCallback):
    """Calls back once per optimiser step, after the update."""

    def __init__(self, trainer: SIMTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.trainer.finish_step()
