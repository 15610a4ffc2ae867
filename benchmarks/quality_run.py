"""One run of the comparison of supervisions: train (or go on), measure, write `results.json`. See `quality.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import send_to_device

from sim_hf.data import DetectionCollator, EvalTransform, SeededDataset, load_coco
from sim_hf.evaluation.diagnostics import mask_diagnostics
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.evaluation.prediction import names_of, predict_rows
from sim_hf.evaluation.results import write_results
from sim_hf.structures import box_masks
from sim_hf.training.arguments import SupervisionArguments, parse_arguments, read_config
from sim_hf.training.periodic import draw_confident, given_boxes
from sim_hf.training.pseudo_quality import generated_mask_quality, pseudo_mask_quality
from sim_hf.training.resume import run_identity
from sim_hf.training.second_phase import FOLDER, read_masks
from sim_hf.training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[1] / "scripts" / "configs"
# What a row may change: how masks are supervised, and nothing that makes a comparison unfair.
ROW_OPTIONS = {field.name for field in dataclasses.fields(SupervisionArguments)} | {"box_prompts"}
NUM_PICTURES = 6
MEASURED_IMAGES = 64  # training images whose real masks are compared


class OutOfTimeError(Exception):
    """The time given is over; the run has written a checkpoint and can go on."""


@dataclass(frozen=True)
class Run:
    """A row of the table with one seed. options: of `sim-hf train`, by name; flags: the same, as typed, over the options."""

    row: str
    seed: int
    folder: Path
    options: dict[str, Any]
    flags: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        """Exists when the run is finished and measured."""
        return self.folder / "results.json"

    def arguments(self):
        """The four groups of arguments; the options are kept beside the run, as a file for `sim-hf train --config`."""
        path = self.folder / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.options, sort_keys=False), encoding="utf-8")
        return parse_arguments(["--config", str(path), *self.flags])


def make_run(row: str, seed: int, *, size: str, data: Sequence[Path], folder: Path, flags: Sequence[str] = ()) -> Run:
    """The settings of the size, those of the row over them, and what belongs to this run alone."""
    row_options = read_config(CONFIGS / f"quality-{row}.yaml")
    foreign = sorted(set(row_options) - ROW_OPTIONS)
    if foreign:
        raise ValueError(
            f"quality-{row}.yaml may only change the supervision, not {', '.join(foreign)}: rows must stay comparable"
        )
    options = {
        **read_config(CONFIGS / f"quality-size-{size}.yaml"),
        **row_options,
        "data": [str(place) for place in data],
        "seed": seed,
        "output_dir": str(folder / "train"),
        "resume": "auto",
        "report_to": ["none"],
    }
    return Run(row, seed, folder, options, tuple(flags))


class BoundedTrainer(Trainer):
    """A `Trainer` that writes a checkpoint and stops when its time is over, and knows how long its steps took."""

    def __init__(self, arguments, deadline: float | None) -> None:
        super().__init__(arguments)
        self.deadline = deadline
        self.initial_weights = weights_digest(self.student)
        self.step_seconds: list[float] = []

    def optimizer_step(self, stream) -> dict[str, float]:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.resumer.save()
            raise OutOfTimeError
        started = time.perf_counter()
        record = super().optimizer_step(stream)
        self.step_seconds.append(time.perf_counter() - started)
        return record


def finish(run: Run, deadline: float | None = None) -> None:
    """Train to the end and measure. A finished run is left alone, a broken-off one goes on.

    Raises OutOfTimeError, after a checkpoint, when it did not come to its end.
    """
    arguments = run.arguments()
    identity = run_identity(*arguments)
    if run.results.exists():
        return
    trainer = BoundedTrainer(arguments, deadline)
    metrics = trainer.train()
    if not metrics:
        raise ValueError(f"{trainer.data_arguments.data} has no validation images to measure on")
    save_pictures(trainer, run.folder / "pictures")
    write_results(
        run.results,
        {**metrics, **metrics_of_others(trainer), **training_image_quality(trainer), **prototype_state(trainer)},
        extra={
            "row": run.row,
            "seed": run.seed,
            "steps": trainer.run.max_steps,
            "seconds_per_step": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
            "initial_weights": trainer.initial_weights,
            "options": identity,
        },
    )
    for folder in ("checkpoints", "best"):  # of no more use, and the weights of many runs fill a disk; train/model stays
        shutil.rmtree(run.folder / "train" / folder, ignore_errors=True)


def weights_digest(model: torch.nn.Module) -> str:
    """A number that two networks share only when every weight is the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def prototype_state(trainer: Trainer) -> dict[str, float]:
    """Sameness and use of the prototypes at the end, where the supervision has some."""
    bank = trainer.step.prototype_bank
    if bank is None:
        return {}
    return {"prototype_cosine": float(bank.diversity()), "prototype_usage": float(bank.usage_entropy())}


def metrics_of_others(trainer: Trainer) -> dict[str, float | None]:
    """COCO numbers on the validation images of the second and further folders, as FOLDER/segm/AP and so on."""
    found: dict[str, float | None] = {}
    for folder in list(dict.fromkeys(map(Path, trainer.data_arguments.data)))[1:]:
        annotations = folder / "instances_val.json"
        metrics, _ = evaluate_model(
            trainer.exported, trainer.processor, load_coco(folder / "images", annotations), annotations, progress=folder.name
        )
        found |= {f"{folder.name}/{name}": value for name, value in metrics.items()}
    return found


@torch.no_grad()
def training_image_quality(trainer: Trainer, limit: int = MEASURED_IMAGES) -> dict[str, float]:
    """Masks on training images of the first folder against the real ones, which only `full` has seen: the exported network's
    mask of each given box (its matched query), the pseudo mask where there are any, the box filled in; and the diagnostics of
    the first of these."""
    folder = Path(trainer.data_arguments.data[0])
    rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
    if trainer.step.second_phase:
        pseudo = generated_mask_quality(rows, read_masks(trainer.output_dir / FOLDER), limit=limit)
    else:
        pseudo = pseudo_mask_quality(trainer.step, rows, trainer.processor, limit=limit)
    samples = SeededDataset(rows, EvalTransform(int(trainer.processor.size["longest_edge"]), with_masks=True))
    collate = DetectionCollator(trainer.processor.image_mean, trainer.processor.image_std)
    step = trainer.step
    sums: dict[str, float] = {}
    count = 0
    was_training = step.training
    step.eval()
    for start in range(0, min(limit, len(samples)), trainer.run.batch_size):
        batch = collate([samples[i] for i in range(start, min(start + trainer.run.batch_size, limit, len(samples)))])
        measured, number = _masks_of_boxes(step, send_to_device(batch, trainer.accelerator.device))
        for name, value in measured.items():
            sums[name] = sums.get(name, 0.0) + number * value
        count += number
    step.train(was_training)
    chosen = {name: pseudo[name] for name in ("pseudo_mask_iou",) if name in pseudo}
    return {**chosen, **{name: total / max(count, 1) for name, total in sums.items()}}


def _masks_of_boxes(step, batch: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """Means over the instances of a batch that have a real mask, and how many those are."""
    inputs = step.prepare(batch)
    targets = inputs.targets
    real_GHW, has_mask_G = targets.masks_GHW, targets.has_mask_G
    if real_GHW is None:
        return {}, 0
    targets.masks_GHW, targets.has_mask_G = None, torch.zeros_like(has_mask_G)  # the real masks are for the comparison
    positives = step(step.teacher, inputs, step.normalizers([inputs])).positives
    height, width = positives.mask_logits_NHW.shape[-2:]
    stride = targets.input_size[0] / height
    real_GHW = torch.nn.functional.adaptive_avg_pool2d(real_GHW[:, None].float(), (height, width))[:, 0] > 0.5
    chosen_N = (has_mask_G & real_GHW.flatten(1).any(-1))[positives.instance_ids_N]
    ids_N, logits_NHW = positives.instance_ids_N[chosen_N], positives.mask_logits_NHW[chosen_N]
    if len(ids_N) == 0:
        return {}, 0
    boxes_N4 = targets.boxes_G4[ids_N]
    diagnostics = mask_diagnostics(logits_NHW.sigmoid(), boxes_N4, stride)
    return {
        "matched_mask_iou": _mean_iou(logits_NHW > 0, real_GHW[ids_N]),
        "filled_box_iou": _mean_iou(box_masks(boxes_N4, height, width, stride), real_GHW[ids_N]),
        **{name: float(diagnostics[name]) for name in ("fill", "corners", "leak") if name in diagnostics},
    }, len(ids_N)


def _mean_iou(masks_NHW: torch.Tensor, others_NHW: torch.Tensor) -> float:
    both_N = (masks_NHW & others_NHW).flatten(1).sum(-1)
    return float((both_N / (masks_NHW | others_NHW).flatten(1).sum(-1).clamp(min=1)).mean())


def save_pictures(trainer: Trainer, folder: Path) -> None:
    """The first validation images with the predictions, and with the given boxes: columns of the sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names_of(trainer.exported)
    stream = predict_rows(trainer.exported, trainer.processor, trainer.data.val, limit=NUM_PICTURES)
    for index, (row, picture, result) in enumerate(stream):
        draw_confident(picture, result, names).save(folder / f"{index}.jpg", quality=90)
        given_boxes(picture, row, trainer.data.val).save(folder / f"{index}-given.jpg", quality=90)
