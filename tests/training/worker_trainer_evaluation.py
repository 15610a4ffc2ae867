"""Both trainers with evaluation, and what two ranks of them measure: `torchrun ... worker_trainer_evaluation.py DATA OUTPUT`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import Trainer, TrainingArguments

from factories import make_step, tiny_model, tiny_processor
from sim_hf.data import SeededDataset, load_coco
from sim_hf.training.arguments import DataArguments, SupervisionArguments
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.loaders import train_collator, train_transform
from sim_hf.training.stock_trainer import CocoEvaluation, StockTrainerAdapter

AUGMENTATION = DataArguments(scale_min=0.9, scale_max=1.1)


def arguments(folder: Path, **options) -> TrainingArguments:
    values = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **values)


def load_rows(data: Path, split: str):
    return load_coco(data / "images", data / f"instances_{split}.json", with_masks=split == "val", cache_dir=data / "cache")


def sim_trainer(data: Path, folder: Path, *, backbone: str = "resnet", **options) -> SIMTrainer:
    return SIMTrainer(
        model=tiny_model(backbone),
        args=arguments(folder, **options),
        supervision=SupervisionArguments(supervision="boxinst"),
        image_processor=tiny_processor(),
        train_dataset=load_rows(data, "train"),
        eval_dataset=load_rows(data, "val"),
        augmentation=AUGMENTATION,
    )


def stock_trainer(data: Path, folder: Path, *, backbone: str = "resnet", **options) -> Trainer:
    model, processor, rows = tiny_model(backbone), tiny_processor(), load_rows(data, "val")
    step = make_step(model, "boxinst", max_steps=options["max_steps"])
    adapter = StockTrainerAdapter(step, evaluation=CocoEvaluation(processor, rows))
    transform = train_transform(processor, AUGMENTATION, with_masks=False)
    samples = {split: SeededDataset(load_rows(data, split), transform, 0) for split in ("train", "val")}
    trainer = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=[samples["train"][index] for index in range(len(samples["train"]))],
        eval_dataset=[samples["val"][index] for index in range(len(samples["val"]))],
        data_collator=adapter.collator(train_collator(processor)),
        compute_loss_func=adapter.compute_loss,
    )
    adapter.attach(trainer)
    trainer.measured_rows = rows
    return trainer


def main(data: Path, folder: Path) -> None:
    measured = {}
    for name, make in (("sim", sim_trainer), ("stock", stock_trainer)):
        trainer = make(data, folder / name, max_steps=1, learning_rate=0.0, eval_strategy="steps", eval_steps=1)
        trainer.train()
        line = next(line for line in trainer.state.log_history if "eval_segm/AP" in line)
        measured[name] = {key: value for key, value in line.items() if "AP" in key or "AR" in key}
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
