"""From arguments to parts: data, model, criterion, teacher, memory bank, optimiser and schedule."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.image_utils import SizeDict

from sim_hf.criteria.build import build_criterion
from sim_hf.data.category_ids import category_feature, category_ids
from sim_hf.data.coco import load_coco
from sim_hf.data.hub import load_detection_dataset
from sim_hf.data.mixture import MixedRows
from sim_hf.mask_generation.memory_bank import MemoryBank
from sim_hf.models.architectures import InstanceSegmenter, architecture_of, architecture_of_preset, preset_processor
from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor, load_backbone_weights
from sim_hf.training.arguments import DataArguments, ModelArguments, RunArguments, SupervisionArguments, steps_of
from sim_hf.training.data_demands import queries_for
from sim_hf.training.optimizer import build_optimizer, build_scheduler
from sim_hf.training.step import TrainingStep
from sim_hf.training.teacher import EMATeacher, momentum_for_steps

logger = logging.getLogger(__name__)


@dataclass
class RunData:
    """Rows to train and evaluate on. names[i] and category_ids[i] belong to label i. ground_truth: a COCO file or the rows
    of a data set that has none; None when there is nothing to evaluate on."""

    train: Any  # MixedRows, or an IterableDataset when streaming
    names: list[str]
    category_ids: list[int]
    val: object | None = None
    ground_truth: object | None = None
    streaming: bool = False


def coco_folder(folder: str | Path) -> dict[str, Path]:
    """The files of a data folder; what is missing is named."""
    folder = Path(folder)
    paths = {
        "images": folder / "images",
        "train": folder / "instances_train.json",
        "val": folder / "instances_val.json",
    }
    for name in ("images", "train"):
        if not paths[name].exists():
            raise FileNotFoundError(
                f"{folder}: a data folder holds images/ and instances_train.json; {paths[name]} is missing. "
                f"COCO files in another layout become one: sim-hf convert coco {folder} --output FOLDER --val-fraction 0.1"
            )
    return paths


def _coco_files(images: str | None, annotations: str | None) -> tuple[Path, Path]:
    if not images or not annotations:
        raise ValueError(f"a COCO file and the folder of its images go together, got file {annotations!r} and folder {images!r}")
    return Path(images), Path(annotations)


def build_data(data: DataArguments, *, with_masks: bool) -> RunData:
    """The data of a run; real masks are read from the annotation files only when `with_masks`."""
    if data.dataset:
        return _hub_data(data.dataset, data)
    if data.data:
        folders = [coco_folder(folder) for folder in data.data]
        pairs = [(paths["images"], paths["train"]) for paths in folders]
        val = (folders[0]["images"], folders[0]["val"]) if folders[0]["val"].exists() else None
    else:
        pairs = [_coco_files(data.train_images, data.train_annotations)]
        val = _coco_files(data.val_images, data.val_annotations) if data.val_annotations else None
    datasets = [
        load_coco(images, annotations, with_masks=with_masks, box_format=data.box_format) for images, annotations in pairs
    ]
    train = MixedRows(datasets)
    ids = category_ids(datasets[0]) if len(datasets) == 1 else list(range(1, len(train.names) + 1))
    if val is None:
        return RunData(train, train.names, ids)
    images, annotations = val
    rows = load_coco(images, annotations, with_masks=False, box_format=data.box_format)
    return RunData(train, train.names, ids, val=rows, ground_truth=annotations)


def _hub_data(dataset: str, data: DataArguments) -> RunData:
    train = load_detection_dataset(dataset, data.train_split, streaming=data.streaming)
    names = category_feature(train).names
    rows = train if data.streaming else MixedRows([train])
    val = load_detection_dataset(dataset, data.val_split) if data.val_split else None
    return RunData(rows, names, category_ids(train), val=val, ground_truth=val, streaming=data.streaming)


def build_model(
    model: ModelArguments,
    *,
    names: list[str],
    category_ids: list[int],
    image_size: int | None = None,
    crowded: int = 0,
) -> tuple[Any, SIMImageProcessor, list[str]]:
    """The network and its image processor -> (model, processor, what was loaded, a line each). crowded: objects in a crowded
    training image, for which it gets queries (`data_demands.py`)."""
    id2label: Mapping[int, str] = dict(enumerate(names))
    report: list[str] = []
    if model.model:
        chosen = {} if model.box_prompts is None else {"box_prompts": model.box_prompts}
        network, transfer = architecture_of(model.model).load_for_classes(model.model, id2label=id2label, **chosen)
        processor = SIMImageProcessor.from_pretrained(model.model)
        report.append(str(transfer))
    else:
        chosen = {"backbone": model.backbone, "box_prompts": model.box_prompts}
        overrides = {name: value for name, value in chosen.items() if value is not None}
        architecture = architecture_of_preset(model.preset)
        config = architecture.config.from_preset(model.preset, id2label=id2label, **overrides)
        config.freeze_batch_norm = bool(model.backbone_weights)
        network = architecture.model(config)
        processor = preset_processor(model.preset)
        if model.backbone_weights is None:
            report.append(
                "the whole network starts from random weights (--model or --backbone_weights start it from better ones)"
            )
    if model.freeze_batch_norm is not None:
        network.config.freeze_batch_norm = model.freeze_batch_norm
    if model.backbone_weights:
        report.append(str(load_backbone_weights(network, model.backbone_weights)))
    network.config.category_ids = list(category_ids)
    report.extend(_set_queries(network, model.num_queries, crowded))
    report.extend(_set_image_size(processor, image_size))
    return network, processor, report


def _set_queries(network: InstanceSegmenter, num_queries: int | None, crowded: int) -> list[str]:
    """More queries where the user or crowded images ask for them -> what has to be said about it."""
    if not isinstance(network, SIMForInstanceSegmentation):
        if num_queries is not None:
            raise ValueError("--num_queries: CondInst has none, its limit is max_detections of its configuration")
        return []
    present = network.config.num_queries
    if num_queries is None:
        num_queries = queries_for(crowded, present)
    if num_queries == present:
        return []
    network.resize_queries(num_queries)
    found = f" (of a hundred training images 99 hold at most {crowded})" if crowded > present else ""
    return [f"{num_queries} queries instead of {present}: that many objects can be found in a picture{found}"]


def _set_image_size(processor: SIMImageProcessor, image_size: int | None) -> list[str]:
    """Give the processor a longest side, by which training scales -> what has to be said about it.

    Stock Mask2Former checkpoints squash images to a square (384 x 384 on the Hub); training and prediction keep the aspect ratio.
    """
    size = processor.size
    if image_size is not None:
        processor.size = SizeDict(longest_edge=image_size, shortest_edge=size.shortest_edge)
    elif size.height and size.width:
        side = max(size.height, size.width)
        processor.size = SizeDict(longest_edge=side)
        squashed = f"the checkpoint squashes images to {size.height} x {size.width}"
        return [f"{squashed}; here they keep their aspect ratio, with {side} pixels at most (--image_size for another size)"]
    elif not size.longest_edge:
        raise ValueError(f"the checkpoint says no longest side of the images ({dict(size)}): give --image_size")
    return []


def build_step(
    network: InstanceSegmenter,
    processor: SIMImageProcessor,
    supervision: SupervisionArguments,
    run: RunArguments,
) -> TrainingStep:
    """Criterion, teacher and memory bank of a supervision, ready to train `network`."""

    def steps(length: float) -> int:
        return steps_of(length, run.max_steps)

    criterion = build_criterion(supervision, network.config, steps=steps)
    momentum = supervision.teacher_momentum or momentum_for_steps(run.max_steps)
    pastes = supervision.supervision == "sim" and supervision.paste_weight > 0 and supervision.paste_probability > 0
    return TrainingStep(
        criterion,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        teacher=EMATeacher(network, momentum=momentum),
        memory_bank=MemoryBank(capacity=supervision.bank_capacity) if pastes else None,
        paste_probability=supervision.paste_probability,
        paste_start_step=steps(supervision.pseudo_start),
        box_prompts=network.config.box_prompts,
        strong_augmentation=supervision.strong_augmentation,
        seed=run.seed,
    )


def build_optimization(
    network: nn.Module, run: RunArguments, *, restart_step: int | None = None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Optimiser and learning rate schedule of a run. restart_step: see `build_scheduler`."""
    optimizer = build_optimizer(
        network,
        optimizer=run.optimizer,
        learning_rate=run.learning_rate,
        backbone_lr_multiplier=run.backbone_lr_multiplier,
        weight_decay=run.weight_decay,
        momentum=run.momentum,
    )
    scheduler = build_scheduler(
        optimizer,
        schedule=run.lr_schedule,
        warmup_steps=steps_of(run.lr_warmup, run.max_steps),
        max_steps=run.max_steps,
        lr_steps=[steps_of(length, run.max_steps) for length in run.lr_steps],
        restart_step=restart_step,
    )
    return optimizer, scheduler
