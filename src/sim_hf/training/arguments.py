"""The command line of a training run: four dataclasses, a YAML file as defaults, flags win.

Lengths of the schedule may be given in optimiser steps (a whole number) or as a fraction of the run (0..1): a short
fine-tuning run needs the paper's schedule as fractions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from sim_hf.criteria.build import MASK_CRITERIA, MATCHING_COSTS
from sim_hf.criteria.set_criterion import POSITIVES
from sim_hf.models.architectures import PRESETS
from sim_hf.training.optimizer import OPTIMIZERS, SCHEDULES


@dataclass
class ModelArguments:
    """Which network, and where its weights come from."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id to start from: a sim_hf model or any Mask2Former checkpoint."}
    )
    preset: str = field(default="tiny", metadata={"help": f"Architecture when --model is not given: {', '.join(PRESETS)}."})
    backbone: str | None = field(
        default=None, metadata={"help": "Another backbone than the preset's: 'timm:NAME' or a transformers model type."}
    )
    backbone_weights: str | None = field(
        default=None, metadata={"help": "ImageNet weights of the backbone: a safetensors file, a folder or a Hub id."}
    )
    freeze_batch_norm: bool | None = field(
        default=None, metadata={"help": "Freeze the backbone's BatchNorm statistics (default: when weights were loaded)."}
    )
    num_queries: int | None = field(
        default=None,
        metadata={
            "help": "Objects that the network can find in a picture, at least those it has (default: more than that where the "
            "training images hold more)."
        },
    )
    box_prompts: bool | None = field(
        default=None,
        metadata={
            "help": "The network can be asked for the mask in a given box (default: a preset can, --model stays as it is)."
        },
    )


@dataclass
class DataArguments:
    """Which images, and what happens to them on the way in."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders with images/ + instances_train.json + instances_val.json; several are mixed, classes joined by name."
        },
    )
    train_images: str | None = field(default=None, metadata={"help": "Image folder of --train_annotations."})
    train_annotations: str | None = field(default=None, metadata={"help": "COCO file with boxes to train on."})
    val_images: str | None = field(default=None, metadata={"help": "Image folder of --val_annotations."})
    val_annotations: str | None = field(
        default=None, metadata={"help": "COCO file to evaluate on (masks are used if it has any)."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or local path of a data set with image + objects{bbox, category}."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of --dataset to train on."})
    val_split: str | None = field(default="validation", metadata={"help": "Split of --dataset to evaluate on."})
    streaming: bool = field(default=False, metadata={"help": "Stream --dataset instead of downloading it first."})
    box_format: str = field(default="xywh", metadata={"help": "What bbox holds in the COCO files: xywh (COCO) or xyxy."})
    use_masks: bool = field(
        default=False, metadata={"help": "Mixed supervision: use the real mask of an instance where the file has one."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Longest side of the input (default: the preset's)."})
    scale_min: float = field(default=0.5, metadata={"help": "Large-scale jitter: smallest scale."})
    scale_max: float = field(default=2.0, metadata={"help": "Large-scale jitter: largest scale."})
    zoom: float = field(
        default=0.0, metadata={"help": "Share of the samples that look at one object enlarged, as `sim-hf label` does."}
    )
    mosaic: float = field(
        default=0.0,
        metadata={
            "help": "Share of the samples that are four images on one canvas: more, smaller objects. Slows an untrained start."
        },
    )
    flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    color_jitter: float = field(default=0.2, metadata={"help": "Strength of brightness, contrast and saturation jitter."})
    num_workers: int = field(default=0, metadata={"help": "Loader processes (the stream of samples does not depend on them)."})


@dataclass
class SupervisionArguments:
    """What a mask costs; the defaults are the paper's (SIM, CVPR 2023; BoxInst, CVPR 2021) unless the help says otherwise."""

    supervision: str = field(default="sim", metadata={"help": f"One of {', '.join(MASK_CRITERIA)}."})
    class_weight: float = field(default=2.0, metadata={"help": "Weight of the class loss."})
    no_object_weight: float = field(default=0.1, metadata={"help": "Class weight of 'no object'."})
    class_cost: float = field(default=2.0, metadata={"help": "Matching: weight of the class."})
    mask_cost: float = field(default=5.0, metadata={"help": "Matching: weight of the projections (or masks, for full)."})
    matching: str = field(
        default="own",
        metadata={"help": "Mask cost of the matching: own (full: masks; else projections), projections, boxes (L1 + GIoU)."},
    )
    mask_weight: float = field(default=5.0, metadata={"help": "BCE weight where a real mask is given."})
    dice_weight: float = field(default=5.0, metadata={"help": "Dice weight where a real mask is given."})
    projection_weight: float = field(default=5.0, metadata={"help": "BoxInst's projection loss."})
    exact_box_edges: bool = field(
        default=True,
        metadata={
            "help": "Projections compare with the share of each row and column of cells that a small box covers, not with "
            "whole cells (not in the paper)."
        },
    )
    pairwise_weight: float = field(default=2.0, metadata={"help": "BoxInst's pairwise colour affinity loss."})
    pairwise_warmup: float = field(default=1 / 9, metadata={"help": "Linear warm-up of the pairwise loss (steps or fraction)."})
    color_threshold: float = field(default=0.3, metadata={"help": "Colour similarity above which neighbours must agree."})
    pairwise_dilation: int = field(default=2, metadata={"help": "Dilation of the 3x3 neighbourhood on the mask grid."})
    level_set_image_weight: float = field(default=0.05, metadata={"help": "Box2Mask's region energy of the colours."})
    level_set_feature_weight: float = field(default=5.0, metadata={"help": "Box2Mask's region energy of the mask features."})
    consistency_weight: float = field(default=0.2, metadata={"help": "Box2Mask's local consistency loss."})
    consistency_iterations: int = field(default=10, metadata={"help": "Refinements of the mask in the local consistency loss."})
    tightness_weight: float = field(default=5.0, metadata={"help": "BBTP's loss of rows and columns."})
    smoothness_weight: float = field(default=0.25, metadata={"help": "BBTP's smoothness; 0.05 of the tightness in the paper."})
    pseudo_weight: float = field(default=0.5, metadata={"help": "lambda_1, the pseudo mask loss."})
    pseudo_start: float = field(default=1 / 9, metadata={"help": "When the pseudo mask loss starts (steps or fraction)."})
    pseudo_ramp: float = field(default=0.0, metadata={"help": "Linear ramp of the pseudo mask loss after its start."})
    num_prototypes: int = field(default=10, metadata={"help": "Prototypes per class (the paper's L)."})
    prototype_momentum: float = field(default=0.999, metadata={"help": "EMA of the prototypes (gamma)."})
    hard_assignment: bool = field(
        default=True, metadata={"help": "A pixel moves one prototype (arg-max of the transport) instead of all by its shares."}
    )
    balanced_assignment: bool = field(
        default=False,
        metadata={"help": "Prototypes receive mass by the share of pixels nearest to them (CPSL) instead of equal mass."},
    )
    temperature: float = field(default=0.1, metadata={"help": "tau of the semantic probability map (Eq. 1)."})
    alpha: float = field(
        default=0.7,
        metadata={"help": "Self-correction: 0 = semantic map only, 1 = instance map only (Eq. 7; the paper has 0.5)."},
    )
    mu: float = field(default=5.0, metadata={"help": "Sharpness of positive mask weighting (Eq. 6)."})
    background_prototypes: bool = field(
        default=True,
        metadata={"help": "Semantic map: more like its class than like what surrounds it, not just like it (not in the paper)."},
    )
    pixel_competition: bool = field(
        default=True,
        metadata={"help": "Pseudo masks of instances whose boxes overlap share the pixels there (not in the paper)."},
    )
    small_ellipses: bool = field(
        default=True,
        metadata={"help": "Pseudo masks of objects of few cells lean on the ellipse in their box (not in the paper)."},
    )
    paste_weight: float = field(default=1.0, metadata={"help": "lambda_2, the copy-paste loss; 0 switches pasting off."})
    paste_probability: float = field(
        default=0.0, metadata={"help": "Share of the images that receive pasted instances; the authors' code has 0.5."}
    )
    bank_capacity: int = field(default=100, metadata={"help": "Images remembered for copy-paste."})
    pseudo_min_iou: float = field(
        default=0.0,
        metadata={
            "help": "Masks of the teacher whose box meets the given one with a lower IoU make no pseudo mask (BoxTeacher: 0.5)."
        },
    )
    pseudo_quality_weight: bool = field(
        default=False,
        metadata={"help": "The pseudo mask loss of an instance counts by how sure the teacher is of it (BoxTeacher)."},
    )
    strong_augmentation: float = field(
        default=0.0,
        metadata={
            "help": "Share of the images that the student, not the teacher, sees in strongly changed colours (BoxTeacher)."
        },
    )
    level_set_weight: float = field(
        default=0.0,
        metadata={"help": "sim: weight of Box2Mask's two terms (the level_set_... and consistency_... options) on top."},
    )
    positives: str = field(
        default="layers",
        metadata={
            "help": "Teacher's queries that make M_I: matched in all layers (layers), in the final one, or its 5 best (many)."
        },
    )
    second_phase: float = field(
        default=1.0,
        metadata={
            "help": "sim: when the teacher labels the training images once, small objects enlarged, to go on with these masks "
            "and a new cycle of the learning rate (steps or fraction, such as 0.5; 1 = never, as in the paper)."
        },
    )
    label_model: str | None = field(
        default=None,
        metadata={
            "help": "A promptable segmenter (SAM, SAM 2; folder or Hub id) that labels in the teacher's place; goes with "
            "--second_phase, 0 for masks from the first step on."
        },
    )
    teacher_momentum: float | None = field(
        default=None, metadata={"help": "EMA of the teacher (default: scaled with the length of the run; 0.9999 at 90k steps)."}
    )


@dataclass
class RunArguments:
    """How long, how fast, where to."""

    output_dir: str = field(default="runs/train", metadata={"help": "Everything a run writes."})
    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=8, metadata={"help": "Images per step and process (split over the accumulation)."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per step; must divide --batch_size."})
    optimizer: str = field(default="adamw", metadata={"help": f"One of {', '.join(OPTIMIZERS)}."})
    learning_rate: float = field(default=5e-4, metadata={"help": "At the end of the warm-up."})
    momentum: float = field(default=0.9, metadata={"help": "Of sgd."})
    backbone_lr_multiplier: float = field(
        default=0.2, metadata={"help": "Learning rate of the backbone, relative; 0 freezes it."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Not applied to norms, biases and embeddings."})
    lr_warmup: float = field(default=0.02, metadata={"help": "Linear warm-up of the learning rate (steps or fraction)."})
    lr_schedule: str = field(default="cosine", metadata={"help": f"One of {', '.join(SCHEDULES)}, after the warm-up."})
    lr_steps: list[float] = field(
        default_factory=lambda: [2 / 3, 8 / 9],
        metadata={"help": "Where --lr_schedule step divides the learning rate by ten (steps or fractions)."},
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0 = none."})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, bf16, fp16 or auto (bf16 where the processor computes in it)."}
    )
    activation_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory in the decoder and encoder."})
    seed: int = field(default=0, metadata={"help": "Of weights, data order, augmentation and pasting."})
    log_every: int = field(default=20, metadata={"help": "Steps between lines of losses and diagnostics."})
    eval_every: float = field(default=0.25, metadata={"help": "Between evaluations (steps or fraction); 0 = only at the end."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate on the first N images only while training."})
    checkpoint_every: float = field(
        default=0.1, metadata={"help": "Between checkpoints (steps or fraction); 0 = only at the end."}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "Newest checkpoints kept (the best one is kept besides)."})
    resume: str | None = field(
        default=None, metadata={"help": "'auto' (newest valid checkpoint of --output_dir) or a checkpoint folder."}
    )
    stop_after: int | None = field(default=None, metadata={"help": "Checkpoint and stop after this many steps; resume later."})
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "tensorboard, trackio, wandb, ... or none."}
    )
    export: str = field(
        default="teacher", metadata={"help": "Weights that are evaluated and exported: teacher (EMA) or student."}
    )
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of torch (default: torch's)."})
    push_to_hub: bool = field(
        default=False, metadata={"help": "At the end, push the model with its card to --hub_model_id (as `sim-hf push` does)."}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "owner/name of the repository to push to."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Push to a private repository only."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to (default: main)."})
    hub_license: str | None = field(default=None, metadata={"help": "Licence of the weights: apache-2.0, cc-by-nc-4.0, ..."})


ArgumentGroups = tuple[ModelArguments, DataArguments, SupervisionArguments, RunArguments]


def steps_of(length: float, max_steps: int) -> int:
    """A length given in steps (above 1) or as a fraction of the run (0..1) -> steps."""
    if length < 0:
        raise ValueError(f"a length of the schedule must not be negative, got {length}")
    return round(length * max_steps) if length <= 1 else round(length)


def parse_arguments(argv: Sequence[str] | None = None, *, prog: str | None = None) -> ArgumentGroups:
    """Flags over the YAML of `--config` over the defaults. Unknown keys and flags are errors."""
    groups: list[Any] = [ModelArguments, DataArguments, SupervisionArguments, RunArguments]  # transformers' type fits no class
    parser = HfArgumentParser(groups, prog=prog)
    parser.add_argument("--config", help="YAML file with any of the options below; flags win over it.")
    config_argument, _ = _config_parser().parse_known_args(argv)
    if config_argument.config:
        parser.set_defaults(**read_config(config_argument.config))
    parsed: tuple[Any, ...] = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    model, data, supervision, run, _ = parsed
    check_arguments(model, data, supervision, run)
    return model, data, supervision, run


def _config_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    return parser


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file; a key that is no option is an error that names it."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: must hold options with their values, got a {type(options).__name__}")
    types = {
        name: expected
        for group in (ModelArguments, DataArguments, SupervisionArguments, RunArguments)
        for name, expected in get_type_hints(group).items()
    }
    unknown = sorted(str(name) for name in options if name not in types)
    if unknown:
        raise ValueError(f"{path}: unknown option(s) {', '.join(unknown)}")
    for name, value in options.items():
        _check_type(f"{path}: {name}", value, types[name])
    return options


def _check_type(place: str, value: Any, expected: Any) -> None:
    """YAML gives numbers and lists their type, which argparse, converting text only, would let through unseen."""
    allowed = get_args(expected) if isinstance(expected, UnionType) else (expected,)
    for kind in allowed:
        if get_origin(kind) is list:
            (of,) = get_args(kind)
            if isinstance(value, list) and all(type(item) is of or (of is float and type(item) is int) for item in value):
                return
        elif type(value) in (kind, str) or (kind is float and type(value) is int):
            return  # text is converted, or refused, as on the command line: 5e-4 is text to YAML 1.1
    names = " or ".join("nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise ValueError(f"{place} must be of type {names}, got {value!r}")


def check_arguments(model: ModelArguments, data: DataArguments, supervision: SupervisionArguments, run: RunArguments) -> None:
    """Contradictions and impossible values, each an error that names the option."""
    sources = [bool(data.data), bool(data.train_annotations), bool(data.dataset)]
    if sum(sources) != 1:
        raise ValueError("give exactly one of --data FOLDER..., --train_annotations FILE (with --train_images DIR), --dataset ID")
    if data.train_annotations and not data.train_images:
        raise ValueError("--train_annotations needs --train_images")
    if data.val_annotations and not data.val_images:
        raise ValueError("--val_annotations needs --val_images")
    for name in ("mosaic", "zoom"):
        if not 0 <= getattr(data, name) <= 1:
            raise ValueError(f"--{name} must be a probability in 0..1, got {getattr(data, name)}")
    if supervision.supervision not in MASK_CRITERIA:
        raise ValueError(f"--supervision must be one of {', '.join(MASK_CRITERIA)}, got {supervision.supervision!r}")
    if supervision.positives not in POSITIVES:
        raise ValueError(f"--positives must be one of {', '.join(POSITIVES)}, got {supervision.positives!r}")
    if supervision.label_model and (supervision.supervision != "sim" or supervision.second_phase == 1):
        raise ValueError(
            "--label_model labels for the second phase: give --supervision sim and --second_phase (0: from the start)"
        )
    if supervision.matching not in MATCHING_COSTS:
        raise ValueError(f"--matching must be one of {', '.join(MATCHING_COSTS)}, got {supervision.matching!r}")
    if run.gradient_accumulation_steps < 1 or run.batch_size % run.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient_accumulation_steps ({run.gradient_accumulation_steps}) must divide --batch_size ({run.batch_size})"
        )
    for name, value, known in (
        ("optimizer", run.optimizer, OPTIMIZERS),
        ("lr_schedule", run.lr_schedule, SCHEDULES),
    ):
        if value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}")
    if run.max_steps < 1:
        raise ValueError(f"--max_steps must be at least 1, got {run.max_steps}")
    if run.push_to_hub and not run.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id owner/name")
    if run.export not in ("teacher", "student"):
        raise ValueError(f"--export must be teacher or student, got {run.export!r}")
    if run.mixed_precision not in ("no", "bf16", "fp16", "auto"):
        raise ValueError(f"--mixed_precision must be no, bf16, fp16 or auto, got {run.mixed_precision!r}")
