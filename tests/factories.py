"""Small things that tests of training share: a network of a few thousand weights and a COCO folder of drawn shapes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import ResNetConfig, SwinConfig

from sim_hf.data import DetectionCollator
from sim_hf.data.collator import denormalize
from sim_hf.models.architectures import InstanceSegmenter
from sim_hf.models.condinst import CondInstConfig, CondInstForInstanceSegmentation
from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.structures import InstanceTargets
from sim_hf.training.arguments import DataArguments, ModelArguments, RunArguments, SupervisionArguments
from sim_hf.training.assembly import build_step
from sim_hf.training.step import TrainingStep

NAMES = ("ellipse", "rectangle")
CATEGORY_IDS = (3, 8)  # with a gap, as COCO's
SIZE = 64
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def tiny_config(backbone: str = "resnet", **overrides) -> SIMConfig:
    """About a hundred thousand weights. The BatchNorm of the ResNet is frozen, so a result does not depend on the batch's
    split."""
    backbones = {
        "resnet": lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
        ),
        "swin": lambda: SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES),
    }
    fields = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "num_attention_heads": 2,
        "encoder_feedforward_dim": 48,
        "dim_feedforward": 48,
        "num_queries": 8,
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: label for label, name in enumerate(NAMES)},
        "freeze_batch_norm": True,
        "box_prompts": True,
        **overrides,
    }
    return SIMConfig(backbone_config=backbones[backbone](), **fields)


def tiny_model(backbone: str = "resnet", *, seed: int = 0, contrast: float = 1000.0, **overrides) -> SIMForInstanceSegmentation:
    """The same weights for the same seed, whatever was drawn before. contrast: of the masks, which a fresh network makes
    gray (0.5 everywhere): so gray that no pseudo mask would ever come of it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SIMForInstanceSegmentation(tiny_config(backbone, **overrides))
    with torch.no_grad():
        layers = [m for m in model.model.transformer_module.decoder.mask_predictor.modules() if isinstance(m, torch.nn.Linear)]
        layers[-1].weight *= contrast
    return model


def tiny_condinst(*, seed: int = 0, **overrides) -> CondInstForInstanceSegmentation:
    """The other architecture, as small, for the same images; BatchNorm is frozen too."""
    fields = {
        "feature_size": 32,
        "num_tower_layers": 1,
        "mask_feature_size": 16,
        "num_mask_layers": 1,
        "sizes_of_interest": [16, 32, 64, 128, 256],
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: label for label, name in enumerate(NAMES)},
        **overrides,
    }
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES[1:]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CondInstForInstanceSegmentation(CondInstConfig(backbone_config=backbone, **fields))


def tiny_processor() -> SIMImageProcessor:
    return SIMImageProcessor(size={"longest_edge": SIZE})


def save_tiny_model(folder: Path, backbone: str = "resnet", **overrides) -> Path:
    """A model folder for `--model`."""
    tiny_model(backbone, **overrides).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def save_tiny_condinst(folder: Path, **overrides) -> Path:
    """The same of the other architecture."""
    tiny_condinst(**overrides).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def write_shapes(folder: Path, *, num_train: int = 8, num_val: int = 3, empty: tuple[int, ...] = ()) -> Path:
    """images/ + instances_{train,val}.json: ellipses and rectangles in plain colours, with boxes and polygons of the masks.

    empty: indices of training images without annotations. Ids count from 1; sizes differ, so there is padding.
    """
    (folder / "images").mkdir(parents=True)
    for split, first, count in (("train", 1, num_train), ("val", 1001, num_val)):
        images, annotations = [], []
        for index in range(count):
            image_id = first + index
            width, height = (SIZE, 48) if index % 2 else (56, SIZE)
            picture, objects = _draw(random.Random(image_id), width, height)
            if split == "train" and index in empty:
                objects = []
            picture.save(folder / "images" / f"{image_id}.png")
            images.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
            for bbox, label, polygon in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": CATEGORY_IDS[label],
                        "bbox": bbox,
                        "area": bbox[2] * bbox[3],
                        "iscrowd": 0,
                        "segmentation": [polygon],
                    }
                )
        categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, NAMES, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def _draw(rng: random.Random, width: int, height: int) -> tuple[Image.Image, list]:
    picture = Image.new("RGB", (width, height), tuple(rng.randrange(60, 110) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    objects = []
    for half in range(rng.choice((1, 2))):  # one object in each half, so none hides another
        label = rng.randrange(2)
        w, h = rng.randrange(16, width // 2 - 2), rng.randrange(18, height - 10)
        x, y = half * width // 2 + rng.randrange(0, width // 2 - w), rng.randrange(0, height - h)
        color = tuple(rng.randrange(130, 250) for _ in range(3))
        (draw.rectangle if label else draw.ellipse)((x, y, x + w - 1, y + h - 1), fill=color)
        fractions = ((0, 0), (1, 0), (1, 1), (0, 1))
        if not label:
            fractions = ((0.5, 0), (0.85, 0.15), (1, 0.5), (0.85, 0.85), (0.5, 1), (0.15, 0.85), (0, 0.5), (0.15, 0.15))
        polygon = [value for fx, fy in fractions for value in (float(x + fx * w), float(y + fy * h))]
        objects.append(([x, y, w, h], label, polygon))
    return picture, objects


def make_batch(num_images: int = 4, *, seed: int = 0, with_masks: bool = False, empty: tuple[int, ...] = ()) -> dict:
    """A collated batch of drawn shapes, padded to 64 x 64; images in `empty` have no instances."""
    samples = []
    for index in range(num_images):
        rng = random.Random(1000 * seed + index)
        width, height = (SIZE, 48) if index % 2 else (56, SIZE)
        picture, objects = _draw(rng, width, height)
        if index in empty:
            objects = []
        pixels = torch.tensor(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(height, width, 3).permute(2, 0, 1)
        boxes = torch.tensor([[x, y, x + w, y + h] for (x, y, w, h), _, _ in objects], dtype=torch.float32).reshape(-1, 4)
        sample = {
            "image": pixels,
            "boxes": boxes,
            "class_labels": torch.tensor([label for _, label, _ in objects], dtype=torch.long),
            "has_mask": torch.full((len(objects),), with_masks),
            "image_id": 1000 * seed + index,
            "orig_size": (height, width),
        }
        if with_masks:
            masks = torch.zeros(len(objects), height, width, dtype=torch.bool)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
                mask[y1:y2, x1:x2] = True
            sample["masks"] = masks
        samples.append(sample)
    processor = tiny_processor()
    return DetectionCollator(processor.image_mean, processor.image_std, pad_to=SIZE)(samples)


def split_batch(batch: dict, size: int) -> list[dict]:
    """The same images in micro-batches of `size`."""
    count = len(batch["labels"])
    return [{name: value[start : start + size] for name, value in batch.items()} for start in range(0, count, size)]


def make_step(model: InstanceSegmenter, supervision: str = "sim", *, max_steps: int = 8, **options) -> TrainingStep:
    """The training step of `model`; SIM's pseudo masks and pasting from the first step on unless `options` say otherwise."""
    options = {"pseudo_start": 0, "paste_probability": 0.7, "num_prototypes": 3, **options}
    step = build_step(
        model,
        tiny_processor(),
        SupervisionArguments(supervision=supervision, **options),
        RunArguments(max_steps=max_steps),
    )
    return step.train()


def prime(step: TrainingStep) -> TrainingStep:
    """Prototypes for every class and a filled memory bank, from drawn shapes: the state of a SIM run in its middle."""
    batch = make_batch(6, seed=50, with_masks=True)
    targets = InstanceTargets.from_labels(batch["labels"], (SIZE, SIZE))
    weights = next(step.teacher.model.parameters())
    outputs = step.teacher(
        pixel_values=batch["pixel_values"].to(weights.device), pixel_mask=batch["pixel_mask"].to(weights.device)
    )
    features_BCHW = outputs.mask_features.float().cpu()
    inside_GHW = torch.nn.functional.avg_pool2d(targets.masks_GHW.float(), SIZE // features_BCHW.shape[-1]) > 0.5
    for image, label, inside_HW in zip(targets.image_ids_G, targets.class_labels_G, inside_GHW, strict=True):
        pixels_MC = features_BCHW[image][:, inside_HW].T
        step.prototype_bank.observe(pixels_MC, label.expand(len(pixels_MC)))
    step.prototype_bank.commit()
    images_BCHW = denormalize(batch["pixel_values"], step.image_mean, step.image_std)
    keys = [int(label["image_id"]) for label in batch["labels"]]
    step.memory_bank.remember(images_BCHW, targets, None, image_keys=keys)
    step.memory_bank.commit()
    return step


def make_arguments(data: Path, model: Path, output_dir: Path, *, supervision: str = "boxinst", **options):
    """Arguments of a run of a few steps on `write_shapes`; `options` are fields of any of the four groups."""
    values = {
        "data": [str(data)],
        "model": str(model),
        "output_dir": str(output_dir),
        "supervision": supervision,
        "max_steps": 4,
        "batch_size": 2,
        "eval_every": 0.0,
        "checkpoint_every": 0.0,
        "log_every": 1,
        "lr_warmup": 0.0,
        "pseudo_start": 0.0,
        "paste_probability": 0.5,
        "num_prototypes": 3,
        "scale_min": 0.9,
        "scale_max": 1.1,
        "report_to": ["none"],
        "mixed_precision": "no",  # "auto" depends on the machine
        **options,
    }
    groups = []
    for group in (ModelArguments, DataArguments, SupervisionArguments, RunArguments):
        names = {name for name in group.__dataclass_fields__ if name in values}
        groups.append(group(**{name: values.pop(name) for name in names}))
    if values:
        raise ValueError(f"no such options: {sorted(values)}")
    return tuple(groups)
