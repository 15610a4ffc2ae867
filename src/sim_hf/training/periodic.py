"""What a run does now and then: evaluate with a picture sheet, and export the model folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.evaluation.prediction import names_of
from sim_hf.evaluation.results import format_table, write_results
from sim_hf.training.named_writes import naming
from sim_hf.visualization import contact_sheet, draw_instances

NUM_PICTURES = 6
PICTURE_THRESHOLD = 0.3
PICTURE_SIDE = 400


def evaluate_and_draw(trainer, *, limit: int | None) -> dict:
    """COCO numbers of the exported network (on all ranks), `results.json` and a picture sheet (main rank) -> metrics."""
    if trainer.data.val is None:
        return {}
    pictures: list[list] = []
    network = trainer.exported
    names = names_of(network)
    accelerator = trainer.accelerator

    def keep_picture(row, picture, result) -> None:
        if len(pictures) < NUM_PICTURES and accelerator.is_main_process:
            pictures.append([given_boxes(picture, row, trainer.data.val), draw_confident(picture, result, names)])

    metrics, evaluator = evaluate_model(
        network,
        trainer.processor,
        trainer.data.val,
        trainer.data.ground_truth,
        batch_size=trainer.run.batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        limit=limit,
        on_result=keep_picture,
    )
    if accelerator.is_main_process:
        step = trainer.step.global_step
        trainer.say(f"step {step}: {trainer.run.export} on {limit or len(trainer.data.val)} images\n{format_table(metrics)}")
        if evaluator.note:
            trainer.say(evaluator.note)
        extra = {"step": step, "seed": trainer.run.seed, "supervision": trainer.supervision.supervision, "note": evaluator.note}
        with naming(trainer.output_dir / "results.json"):
            write_results(trainer.output_dir / "results.json", metrics, extra=extra)
        rows = pictures + pseudo_mask_rows(trainer, names)
        path = trainer.output_dir / "pictures" / f"step-{step:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            contact_sheet(rows, titles=["given boxes", "prediction"]).save(path, quality=90)
    accelerator.wait_for_everyone()
    return metrics


def given_boxes(picture, row: dict, rows):
    """The picture with the boxes that were given."""
    names = dict(enumerate(rows.features["objects"]["category"].feature.names))
    boxes = torch.tensor(row["objects"]["bbox"]).reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], -1)
    result = {"boxes": boxes, "labels": torch.tensor(row["objects"]["category"], dtype=torch.long)}
    return draw_instances(picture, result, names, side=PICTURE_SIDE)


def draw_confident(picture, result: dict, names: dict[int, str]):
    """The picture with the predictions that a person would want to see."""
    sure = result["scores"] >= PICTURE_THRESHOLD
    return draw_instances(picture, {name: value[sure] for name, value in result.items()}, names, side=PICTURE_SIDE)


def pseudo_mask_rows(trainer, names: dict[int, str]) -> list[list]:
    """Training images with the pseudo masks of the last step, where the supervision makes any."""
    seen = trainer.last_seen
    if seen is None:
        return []
    inputs, pseudo = seen
    rows = []
    for image in range(min(2, inputs.targets.num_images)):
        mine = inputs.targets.image_ids_G == image
        if not bool(mine.any()):
            continue
        height, width = (int(side) for side in inputs.pixel_mask_BHW[image].nonzero().amax(0) + 1)  # without the padding
        pixels = to_pil_image(inputs.images_BCHW[image, :, :height, :width].cpu())
        size = inputs.targets.input_size
        probabilities = torch.nn.functional.interpolate(pseudo.probabilities_GHW[mine][:, None].float(), size, mode="bilinear")[
            :, 0
        ]
        result = {
            "boxes": inputs.targets.boxes_G4[mine].cpu(),
            "labels": inputs.targets.class_labels_G[mine].cpu(),
        }
        shown = {**result, "masks": (probabilities > 0.5)[:, :height, :width].cpu()}
        rows.append([draw_instances(pixels, drawn, names, side=PICTURE_SIDE) for drawn in (result, shown)])
    return rows


def export_model(trainer, folder: str = "model") -> Path:
    """The inference folder (config, safetensors, preprocessor), replaced in one move -> its path."""
    target = trainer.output_dir / folder
    network = trainer.exported
    if trainer.accelerator.is_main_process:
        save_model_folder(network, trainer.processor, target)
    trainer.accelerator.wait_for_everyone()
    return target


def save_model_folder(model, processor, target: Path) -> None:
    """Write beside, then swap: a reader sees the old folder or the new one, never half of one."""
    beside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames
        old.rename(target)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with naming(target):
            beside.mkdir(parents=True)
            model.save_pretrained(beside)
            processor.save_pretrained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    beside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
