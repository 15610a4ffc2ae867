"""The whole path once, in minutes: boxes in, masks and mask AP out, with something to look at."""

from __future__ import annotations

import logging
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sim_hf.conversion import CocoSource, write_coco_folder
from sim_hf.data import load_coco, write_scenes
from sim_hf.evaluation import format_table, write_results
from sim_hf.evaluation.baselines import filled_box_metrics, mean_fills
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.evaluation.prediction import names_of
from sim_hf.models.architectures import architecture_of, architecture_of_preset, preset_processor
from sim_hf.models.sim import SIMImageProcessor
from sim_hf.training.arguments import (
    ArgumentGroups,
    DataArguments,
    ModelArguments,
    RunArguments,
    SupervisionArguments,
)
from sim_hf.training.assembly import build_data
from sim_hf.training.data_demands import crowded_image, fitting_input, queries_for, typical_object
from sim_hf.training.periodic import draw_confident, given_boxes, save_model_folder
from sim_hf.training.pseudo_quality import generated_mask_quality, pseudo_mask_quality
from sim_hf.training.second_phase import FOLDER as SECOND_PHASE_FOLDER
from sim_hf.training.second_phase import generate_masks, read_masks
from sim_hf.training.trainer import Trainer
from sim_hf.visualization import contact_sheet

logger = logging.getLogger(__name__)
CHECKPOINT = Path(__file__).resolve().parents[2] / "assets" / "sim-tiny"
MAX_STEPS = 2000
MARKER = ".sim-hf-demo"  # a folder that the next demo may replace
SHEET_ROWS = 8
AT_HOME_AP = 0.25  # box AP of a start that knows such pictures, not just the names of their classes; not tuned
LEARNING_RATE = 5e-4
AT_HOME_RATE = 5e-5  # there is nothing to learn but these pictures
COUNTED_INSTANCES = 100  # per image, by COCO's AP
VAL_FRACTION = 0.2  # of the images, where none are there to measure on


@dataclass(frozen=True)
class DemoOptions:
    """The options of `sim-hf demo`."""

    data: str | None = None
    model: str | None = None
    from_scratch: bool = False
    backbone_weights: str | None = None
    compare: bool = False
    minutes: float = 8.0
    steps: int | None = None
    seed: int = 0
    output_dir: Path = Path("runs/demo")


def run_demo(options: DemoOptions) -> dict:
    """Prepare, train, evaluate, draw, write -> what `results.json` holds."""
    output = options.output_dir
    start = _start(options)
    data = _data(options)
    _fresh_folder(output)
    data = _as_data_folder(data, output / "data")
    if options.compare:
        _check_comparable(data)
    print(f"start: {start.model or 'random weights' + (' + ImageNet backbone' if start.backbone_weights else '')}")
    data = _with_fitting_input(start, data)
    start = _with_affordable_queries(start, data)
    arguments = _arguments(options, start, data, "sim", output / "sim")
    trial = Trainer(_with_pseudo_masks_at_once(arguments))
    before, _ = _evaluate(trial)
    what, kind = _measured(before)
    print(f"before training: {what} AP {_percent(before[f'{kind}/AP'])}, AP50 {_percent(before[f'{kind}/AP50'])}")
    at_home = _is_at_home(start, data, before)
    steps = options.steps or _steps_that_fit(trial, options.minutes)
    del trial
    schedule = {"max_steps": steps, "learning_rate": AT_HOME_RATE if at_home else LEARNING_RATE}
    trainer = Trainer(_with(arguments, **schedule))
    beginning = _weights(trainer.exported)
    print(f"training {steps} steps on {len(trainer.data.train)} images, boxes only")
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    pseudo_masks = _pseudo_quality(trainer, options)
    if at_home:
        print("the start knew these classes in such pictures: the result is the mean of its weights and the trained ones")
        _meet_halfway(trainer.exported, beginning)
    after, evaluator = _evaluate(trainer, sheet=output / "overlays.jpg")
    record = {
        "before": before,
        "filled_boxes": filled_box_metrics(evaluator) if after.get("segm/AP") is not None else None,
        "mean_fill": dict(zip(("predicted", "real"), mean_fills(evaluator), strict=True)),
        "pseudo_masks": pseudo_masks,
        "mean_with_start": at_home,
        "steps": steps,
        "learning_rate": schedule["learning_rate"],
        "training_seconds": round(seconds, 1),
        "seed": options.seed,
        "supervision": "sim",
        "note": evaluator.note,
    }
    if options.compare:
        full = _with(_arguments(options, start, data, "full", output / "full"), **schedule)
        record["full_supervision"] = _full_supervision(full, halfway=at_home)
    save_model_folder(trainer.exported, trainer.processor, output / "model")
    write_results(output / "results.json", after, extra=record)
    _report(after, record, output, data)
    return {**after, **record}


def _fresh_folder(folder: Path) -> None:
    """Empty the folder of an earlier demo; anything else that lies there is not ours to delete."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ValueError(f"--output-dir {folder} holds files that no demo wrote; choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _start(options: DemoOptions) -> ModelArguments:
    if options.from_scratch:
        return ModelArguments(backbone_weights=options.backbone_weights)
    model = options.model or str(CHECKPOINT)
    if options.model is None and not CHECKPOINT.exists():
        raise FileNotFoundError(
            f"{CHECKPOINT} is missing (it comes with a clone of the project); --from-scratch starts without it"
        )
    return ModelArguments(model=model)


def _data(options: DemoOptions) -> DataArguments:
    arguments = DataArguments(scale_min=0.7, scale_max=1.4)
    if not options.from_scratch:
        # A trained start learns a small data set by heart; an untrained one needs whole, single pictures first.
        arguments = replace(arguments, mosaic=0.15, zoom=0.3)
    if options.data is None:
        folder = options.output_dir.parent / "scenes"
        write_scenes(folder)
        return replace(arguments, data=[str(folder)])
    if Path(options.data).is_dir():
        return replace(arguments, data=[options.data])
    if "/" not in options.data or options.data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"--data {options.data}: no such folder (and not a Hub id of the form owner/name)")
    return replace(arguments, dataset=options.data)


def _as_data_folder(data: DataArguments, place: Path) -> DataArguments:
    """COCO files that lie there as other tools lay them out, or without validation images, as a data folder (hard links)."""
    if not data.data:
        return data
    folder = Path(data.data[0])
    if all((folder / name).exists() for name in ("images", "instances_train.json", "instances_val.json")):
        return data
    report = write_coco_folder(CocoSource(folder), place, val_fraction=VAL_FRACTION)
    counts = " and ".join(f"{counts.num_images} images for {split}" for split, counts in report.splits.items())
    print(f"data: {counts}, made of the COCO files in {folder}: {place}")
    return replace(data, data=[str(place)])


def _check_comparable(data: DataArguments) -> None:
    """A comparison with full supervision needs masks to train on: said before the minutes of training, not after."""
    for folder in map(Path, data.data):
        rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
        if not any(any(objects["segmentation"]) for objects in rows["objects"]):
            raise ValueError(f"--compare also trains with the real masks; {folder / 'instances_train.json'} has none")


def _with_fitting_input(start: ModelArguments, data: DataArguments) -> DataArguments:
    """A larger input than the start's where the objects would be too small for masks."""
    processor = SIMImageProcessor.from_pretrained(start.model) if start.model else preset_processor(start.preset)
    present = processor.size.longest_edge
    if not present:  # a stock checkpoint that squashes images: training chooses
        return data
    fitting = fitting_input(typical_object(build_data(data, with_masks=False).train), present)
    if fitting == present:
        return data
    print(f"the objects are small: images of {fitting} px instead of {present}")
    return replace(data, image_size=fitting)


def _with_affordable_queries(start: ModelArguments, data: DataArguments) -> ModelArguments:
    """For crowded images no more queries than instances count: each of them takes its time."""
    config: Any = (
        architecture_of(start.model).config.from_pretrained(start.model)
        if start.model
        else architecture_of_preset(start.preset).config.from_preset(start.preset)
    )
    present = getattr(config, "num_queries", None)
    if present is None or queries_for(crowded_image(build_data(data, with_masks=False).train), present) <= COUNTED_INSTANCES:
        return start
    return replace(start, num_queries=max(present, COUNTED_INSTANCES))


def _arguments(
    options: DemoOptions, start: ModelArguments, data: DataArguments, supervision: str, output: Path
) -> ArgumentGroups:
    """The tiny preset's settings (scripts/configs/tiny-sim.yaml)."""
    run = RunArguments(
        output_dir=str(output),
        max_steps=MAX_STEPS,
        batch_size=4,  # many small steps: in a few minutes the number of updates is what counts
        seed=options.seed,
        mixed_precision="auto",
        eval_every=0,
        checkpoint_every=0,
        report_to=["none"],
        log_every=25,
    )
    return start, data, SupervisionArguments(supervision=supervision, pairwise_dilation=1, color_threshold=0.1), run


def _knows_all_classes(start: ModelArguments, data: DataArguments) -> bool:
    if start.model is None:
        return False
    config = architecture_of(start.model).config.from_pretrained(start.model)
    known = {name.strip().lower() for name in config.id2label.values()}
    return all(name.strip().lower() in known for name in build_data(data, with_masks=False).names)


def _is_at_home(start: ModelArguments, data: DataArguments, before: dict) -> bool:
    """Whether the start knows the classes in pictures like these: the same names may stand for other things elsewhere."""
    return _knows_all_classes(start, data) and (before["bbox/AP"] or 0.0) >= AT_HOME_AP


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _meet_halfway(model: torch.nn.Module, beginning: dict[str, torch.Tensor]) -> None:
    """The mean of what the network was and has become, in place: some minutes on few pictures must not cost what many have
    taught it (WiSE-FT, arXiv 2109.01903)."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(beginning[name], 0.5)


def _with(arguments: ArgumentGroups, **changes: Any) -> ArgumentGroups:
    model, data, supervision, run = arguments
    return model, data, supervision, replace(run, **changes)


def _with_pseudo_masks_at_once(arguments: ArgumentGroups) -> ArgumentGroups:
    """What most steps do, for a trial of a few."""
    model, data, supervision, run = arguments
    return model, data, replace(supervision, pseudo_start=0), run


def _steps_that_fit(trial: Trainer, minutes: float) -> int:
    """Time a few steps of a run that is thrown away, and fill the minutes."""
    trial.model.train()
    trial.step.train()
    stream = iter(trial.batches)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        trial.optimizer_step(stream)
        times.append(time.perf_counter() - started)
    seconds = statistics.mean(times[2:])  # not the median: crowded images, which take longest, count, too
    labelling = _labelling_seconds(trial)
    steps = max(20, min(MAX_STEPS, int((0.92 * 60 * minutes - labelling) / seconds)))
    print(
        f"{seconds:.2f} s a step on this machine ({torch.get_num_threads()} threads): {steps} steps fit into {minutes:g} minutes"
    )
    return steps


def _labelling_seconds(trial: Trainer, num_images: int = 6) -> float:
    """What labelling all training images in the middle of the run will take, from a few of them."""
    if trial.second_phase_step is None:
        return 0.0
    rows = [trial.data.train[index] for index in range(min(num_images, len(trial.data.train)))]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, trial.accelerator.autocast():
        generate_masks(trial.labeller(), rows, Path(folder))
    return (time.perf_counter() - started) / len(rows) * len(trial.data.train)


def _evaluate(trainer: Trainer, sheet: Path | None = None):
    """COCO numbers on the validation images, and the sheet of what was given and what came out."""
    rows: list[list] = []

    def keep(row, picture, result) -> None:
        if sheet is not None and len(rows) < SHEET_ROWS:
            names = names_of(trainer.exported)
            rows.append([given_boxes(picture, row, trainer.data.val), draw_confident(picture, result, names)])
            rows[-1][1].save(sheet.parent / f"overlay-{len(rows)}.jpg", quality=92)

    metrics, evaluator = evaluate_model(
        trainer.exported, trainer.processor, trainer.data.val, trainer.data.ground_truth, on_result=keep
    )
    if sheet is not None:
        contact_sheet(rows, titles=["given boxes (not used here)", "predicted masks"]).save(sheet, quality=92)
    return metrics, evaluator


def _pseudo_quality(trainer: Trainer, options: DemoOptions) -> dict[str, float]:
    """Pseudo masks against the real masks of the training images, where those exist (a measurement, not supervision)."""
    folders = trainer.data_arguments.data
    if not folders:
        return {}
    folder = Path(folders[0])
    rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
    if trainer.step.second_phase:
        return generated_mask_quality(rows, read_masks(trainer.output_dir / SECOND_PHASE_FOLDER))
    return pseudo_mask_quality(trainer.step, rows, trainer.processor)


def _full_supervision(arguments: ArgumentGroups, *, halfway: bool) -> dict:
    """The same start, data and steps with the real masks."""
    print("\nfor comparison: the same with the real masks")
    trainer = Trainer(arguments)
    beginning = _weights(trainer.exported)
    trainer.train()
    if halfway:
        _meet_halfway(trainer.exported, beginning)
    metrics, _ = _evaluate(trainer)
    return metrics


def _report(after: dict, record: dict, output: Path, data: DataArguments) -> None:
    print(f"\n{format_table(after)}")
    before, fills, filled, pseudo = record["before"], record["mean_fill"], record["filled_boxes"], record["pseudo_masks"]
    what, kind = _measured(after)
    print(f"{what} AP   before {_percent(before[f'{kind}/AP'])}, after {_percent(after[f'{kind}/AP'])}")
    print(f"{what} AP50 before {_percent(before[f'{kind}/AP50'])}, after {_percent(after[f'{kind}/AP50'])}")
    if filled:
        print(f"the same detections, boxes filled in: AP {_percent(filled['segm/AP'])}, AP50 {_percent(filled['segm/AP50'])}")
    if record.get("full_supervision"):
        full = record["full_supervision"]
        print(f"trained with the real masks instead: AP {_percent(full['segm/AP'])}, AP50 {_percent(full['segm/AP50'])}")
    real = "" if fills["real"] is None else f" (real masks: {fills['real']:.2f})"
    mean = "n/a, no confident mask yet" if fills["predicted"] is None else f"{fills['predicted']:.2f}"
    print(f"mean fill of the masks, mask area / box area: {mean}{real}; 1.00 would be filled boxes")
    if pseudo:
        print(
            f"pseudo masks on training images: mean IoU {pseudo['pseudo_mask_iou']:.3f} with the real masks, filled boxes "
            f"{pseudo['filled_box_iou']:.3f}; better for {100 * pseudo['share_improved']:.0f} % of {int(pseudo['instances'])}"
        )
    if record["note"]:
        print(record["note"])
    print(f"\nlook at {output}/overlays.jpg; numbers in {output}/results.json. Next:")
    print(f"  sim-hf predict {output}/model PICTURE... --output runs/predictions")
    for folder in data.data:
        files = f"--annotations {folder}/instances_val.json --images {folder}/images"
        print(f"  sim-hf label {output}/model {files} --output labels.json")
    print(
        "  sim-hf train --config scripts/configs/tiny-sim.yaml --data YOUR_FOLDER --model assets/sim-tiny --output_dir runs/mine"
    )


def _measured(metrics: dict) -> tuple[str, str]:
    """What there is to measure by: real masks, or only the boxes of the predicted ones -> what to call it, and its key."""
    return ("box", "bbox") if metrics["segm/AP"] is None else ("mask", "segm")


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"
