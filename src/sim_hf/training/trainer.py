"""The plain Accelerate loop behind `scripts/train.py` and `sim-hf train`.

One optimiser step is: prepare all micro-batches, count their instances, forward and backward each, clip, check, update, tick.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from tqdm.auto import tqdm

from sim_hf.evaluation.diagnostics import collapse_warning
from sim_hf.labeling import Labeller, network_labeller
from sim_hf.processes import leave_process_group
from sim_hf.promptable_segmenter import PromptableSegmenter
from sim_hf.structures import CriterionOutput
from sim_hf.training.arguments import ArgumentGroups, steps_of
from sim_hf.training.assembly import build_data, build_model, build_optimization, build_step
from sim_hf.training.data_demands import crowded_image, fitting_input, typical_object
from sim_hf.training.finite import check_finite, sum_over_ranks
from sim_hf.training.interruption import EXIT_CODE, StopRequest
from sim_hf.training.loaders import MicroBatches
from sim_hf.training.named_writes import naming
from sim_hf.training.out_of_memory import explained
from sim_hf.training.periodic import evaluate_and_draw, export_model
from sim_hf.training.resume import Resumer
from sim_hf.training.second_phase import FOLDER as SECOND_PHASE_FOLDER
from sim_hf.training.second_phase import NO_MASK, OPTIONS, LabelledRows, generate_masks, read_masks
from sim_hf.training.sharding import fsdp_plugin, whole, whole_network
from sim_hf.training.step import StepInputs
from sim_hf.training.step_diagnostics import step_diagnostics

logger = logging.getLogger(__name__)


def precision_of(wanted: str) -> str:
    """ "auto" is bf16 on a GPU or processor with bf16 matrix units, else float32; other names stay what they are."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "no"


class Trainer:
    """Builds a run from its arguments and trains it. `train()` returns the final metrics."""

    def __init__(self, arguments: ArgumentGroups) -> None:
        self.model_arguments, self.data_arguments, self.supervision, self.run = arguments
        run = self.run
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        self.output_dir = Path(run.output_dir)
        plugin = fsdp_plugin()
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=precision_of(run.mixed_precision),
            log_with=[name for name in run.report_to if name != "none"] or None,
            project_config=ProjectConfiguration(project_dir=str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
            fsdp_plugin=plugin,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if plugin is not None and not self.accelerator.is_fsdp2:
            self.say("warning: Accelerate starts FSDP only with several processes on GPUs; this run goes on without it")
        set_seed(run.seed)
        self.with_masks = self.supervision.supervision == "full" or self.data_arguments.use_masks
        with self.accelerator.main_process_first():
            self.data = build_data(self.data_arguments, with_masks=self.with_masks)
        model, self.processor, report = build_model(
            self.model_arguments,
            names=self.data.names,
            category_ids=self.data.category_ids,
            image_size=self.data_arguments.image_size,
            crowded=crowded_image(self.data.train),
        )
        for line in [*report, *self._hint_for_small_objects()]:
            self.say(line)
        if run.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.to(self.accelerator.device)
        self.step = build_step(model, self.processor, self.supervision, run).to(self.accelerator.device)
        self.second_phase_step = self._second_phase_step()
        self.optimizer, self.scheduler = build_optimization(model, run, restart_step=self.second_phase_step)
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.batches = MicroBatches(
            self.data,
            self.data_arguments,
            run,
            self.processor,
            with_masks=self.with_masks,
            accelerator=self.accelerator,
        )
        self.resumer = Resumer(self)
        self.best: dict = {"step": None, "value": -1.0}
        self.last_metrics: dict = {}
        self.last_seen = None

    @property
    def student(self) -> torch.nn.Module:
        """The network without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def exported(self) -> torch.nn.Module:
        """The network that is evaluated and exported, whole (all ranks ask for it: a sharded student is gathered)."""
        assert self.step.teacher is not None  # build_step makes one
        teacher = self.step.teacher.model
        return whole_network(self.student, like=teacher) if self.run.export == "student" else teacher

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def _hint_for_small_objects(self) -> list[str]:
        """Masks of small objects are coarse: an input that the user has not chosen may be too small for them."""
        present, typical = self.processor.size.longest_edge, typical_object(self.data.train)
        fitting = present if typical is None else fitting_input(typical, present)
        if self.data_arguments.image_size is not None or fitting == present:
            return []
        small = f"half of the objects are smaller than {typical * present:.0f} of {present} input pixels, and their masks coarse"
        return [f"hint: {small}; --image_size {fitting} enlarges them (and a step takes longer)"]

    def train(self) -> dict:
        """Train to `max_steps` (or `stop_after`), evaluate, export -> the final metrics. SIGTERM ends it after the step it is
        in, with a checkpoint and `SystemExit`."""
        run = self.run
        self.resumer.resume()
        if self.accelerator.log_with:
            self.accelerator.init_trackers("sim_hf")
        self.model.train()
        self.step.train()
        with StopRequest(self.accelerator) as stop:
            self._take_steps(min(run.max_steps, run.stop_after or run.max_steps), stop)
        is_over = self.step.global_step >= run.max_steps
        if is_over:
            self.evaluate(limit=None)
            export_model(self)
        if self.accelerator.log_with:
            self.accelerator.end_training()
        if stop.asked and not is_over:
            leave_process_group()
            raise SystemExit(EXIT_CODE)
        return self.last_metrics

    def _take_steps(self, last: int, stop: StopRequest) -> None:
        run = self.run
        eval_every, save_every = steps_of(run.eval_every, run.max_steps), steps_of(run.checkpoint_every, run.max_steps)
        stream = iter(self.batches)
        bar = tqdm(
            total=run.max_steps,
            initial=self.step.global_step,
            desc=f"train {self.supervision.supervision}",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        while self.step.global_step < last:
            if self.second_phase_is_due:
                stream = self.begin_second_phase()
            with explained(self.step, self.optimizer, run):
                record = self.optimizer_step(stream)
            done = self.step.global_step
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.2f}")
            if done % run.log_every == 0 or done == 1:
                self.log(record)
            if eval_every and done % eval_every == 0 and done < run.max_steps:
                self.evaluate(limit=run.eval_limit)
            stops = stop.agreed()
            if (save_every and done % save_every == 0) or done == last or stops:
                self.resumer.save()
            if stops and done < last:
                self.say(f"SIGTERM: stopped at step {done} with a checkpoint; --resume auto goes on")
                break
        bar.close()

    def _second_phase_step(self) -> int | None:
        """Step at which the training images are labelled; None when they are not."""
        start = steps_of(self.supervision.second_phase, self.run.max_steps)
        if self.supervision.supervision != "sim" or start >= self.run.max_steps:
            return None
        if self.data.streaming:
            self.say("warning: a stream is not labelled by its teacher (--second_phase needs a data set that is not --streaming)")
            return None
        return start

    @property
    def second_phase_is_due(self) -> bool:
        start = self.second_phase_step
        return start is not None and self.step.global_step >= start and not self.step.second_phase

    def begin_second_phase(self) -> Iterator[list[dict]]:
        """Label the training images, or read what was said before the run was interrupted -> the stream of the same images,
        with masks."""
        folder = self.output_dir / SECOND_PHASE_FOLDER
        if self.step.global_step > (self.second_phase_step or 0):
            masks = read_masks(folder)
        else:
            with self.accelerator.autocast():
                masks = generate_masks(
                    self.labeller(),
                    self.data.train,
                    folder,
                    process_index=self.accelerator.process_index,
                    num_processes=self.accelerator.num_processes,
                    barrier=self.accelerator.wait_for_everyone,
                )
        found = [mask != NO_MASK for row in masks for mask in row]
        self.say(f"second phase: {sum(found)} of {len(found)} instances have a mask now, the others keep their box")
        self.batches.read(LabelledRows(self.data.train, masks), with_masks=True)
        self.step.second_phase = True
        return iter(self.batches)

    def labeller(self) -> Labeller:
        """Who labels the training images: the teacher, or the promptable segmenter that is named."""
        if self.supervision.label_model:
            return PromptableSegmenter.from_pretrained(self.supervision.label_model, self.accelerator.device).masks_for_boxes
        assert self.step.teacher is not None  # build_step makes one
        return network_labeller(self.step.teacher.model, self.processor, OPTIONS)

    def optimizer_step(self, stream: Iterator[list[dict]]) -> dict[str, float]:
        """One update over all micro-batches -> what was measured (losses summed over micro-batches and ranks)."""
        inputs = [self.step.prepare(batch) for batch in next(stream)]
        normalizers = self.step.normalizers(inputs)
        sums: dict[str, float] = {}
        outputs: list[CriterionOutput] = []
        for index, micro in enumerate(inputs):
            last = index == len(inputs) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    output = self.step(self.model, micro, normalizers)
                # DDP averages over ranks while the counts are of all ranks together.
                self.accelerator.backward(output.total * self.accelerator.num_processes)
            outputs.append(output)
            values = torch.stack([loss.detach().float() for loss in output.losses.values()]).tolist()  # one wait for a GPU
            for name, value in zip(output.losses, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm or math.inf)
        gradient_norm = float(whole(cast(torch.Tensor, norm)))  # accelerate's None is for DeepSpeed engines
        losses = sum_over_ranks(sums, self.accelerator)
        record = {"loss": sum(losses.values()), **losses, "gradient_norm": gradient_norm}
        step = self.step.global_step
        check_finite(losses, sums, gradient_norm, inputs, step=step, accelerator=self.accelerator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.optimizer_step_was_skipped:
            self.step.after_skipped_update()
            self.batches.advance()
            self.say(f"step {self.step.global_step}: fp16 overflow, update skipped, loss scale reduced")
            return record
        self.scheduler.step()
        self.step.after_update(self.student)
        self.batches.advance()
        if outputs[-1].pseudo_masks is not None:
            self.last_seen = (inputs[-1], outputs[-1].pseudo_masks)
        if self.step.global_step % self.run.log_every == 0:
            record.update(self._diagnose(inputs[-1], outputs[-1]))
        return record

    def _diagnose(self, inputs: StepInputs, output: CriterionOutput) -> dict[str, float]:
        """Mask-free diagnostics of the student's final positives (METHOD: fill, corner, centre, leak) and the criterion's."""
        values = step_diagnostics(inputs, output)
        warning = collapse_warning(values) if "num_instances" in values else None
        if warning:
            self.say(f"step {self.step.global_step}: warning: {warning}")
        return values

    def log(self, record: dict[str, float]) -> None:
        """One line on the console, one in metrics.jsonl, one for each tracker."""
        step = self.step.global_step
        record = {"step": step, "learning_rate": float(self.scheduler.get_last_lr()[0]), **record}
        if self.accelerator.is_main_process:
            shown = {k.removeprefix("loss_"): v for k, v in record.items() if k not in ("step", "learning_rate")}
            tqdm.write(f"step {step:>6}  " + "  ".join(f"{k} {v:.3g}" for k, v in shown.items()))
            self.output_dir.mkdir(parents=True, exist_ok=True)
            path = self.output_dir / "metrics.jsonl"
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.accelerator.log_with:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)

    def evaluate(self, *, limit: int | None) -> None:
        """Mask and box AP of the exported network on the validation images, a picture sheet, and the best step so far."""
        metrics = evaluate_and_draw(self, limit=limit)
        self.model.train()
        if not metrics:
            return
        self.last_metrics = metrics
        value = metrics.get("segm/AP")
        value = metrics.get("bbox/AP") if value is None else value
        if value is not None and value >= self.best["value"]:
            self.best = {"step": self.step.global_step, "value": value}
            export_model(self, folder="best")
        if self.accelerator.log_with:
            self.accelerator.log({k: v for k, v in metrics.items() if isinstance(v, float)}, step=self.step.global_step)


def train(arguments: ArgumentGroups) -> dict:
    """Build and train -> final metrics (empty when there is nothing to evaluate on)."""
    return Trainer(arguments).train()
