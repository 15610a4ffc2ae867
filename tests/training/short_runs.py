"""Runs of some steps by SIMTrainer and by a stock transformers.Trainer, and what is left of them."""

import torch
from transformers import Trainer as StockTrainer
from transformers import TrainingArguments

from factories import prime, tiny_model, tiny_processor
from sim_hf.data import SeededDataset
from sim_hf.training.arguments import DataArguments, SupervisionArguments
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.loaders import train_collator, train_transform

AUGMENTATION = DataArguments(scale_min=0.9, scale_max=1.1)
STEPS = 3


def supervision(name="sim", **options):
    options = {"pseudo_start": 0.0, "num_prototypes": 3, "paste_probability": 0.5, **options}
    return SupervisionArguments(supervision=name, **options)


def hf_arguments(folder, **options):
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "lr_scheduler_type": "constant",
        "seed": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **values)


def sim_trainer(folder, rows, *, name="sim", backbone="resnet", primed=True, model_options=None, **options):
    trainer = SIMTrainer(
        model=tiny_model(backbone, **(model_options or {})),
        args=hf_arguments(folder, **options),
        supervision=supervision(name),
        image_processor=tiny_processor(),
        train_dataset=rows["train"],
        eval_dataset=rows["val"],
        augmentation=AUGMENTATION,
    )
    if name == "sim" and primed:
        prime(trainer.step)
    return trainer


def named_losses(history):
    return [{name: value for name, value in line.items() if name.startswith("loss_")} for line in history if "loss" in line]


def stock_trainer(folder, samples, adapter, model, **options):
    trainer = StockTrainer(
        model,
        hf_arguments(folder, remove_unused_columns=False, train_sampling_strategy="sequential", **options),
        train_dataset=samples,
        data_collator=adapter.collator(train_collator(tiny_processor())),
        compute_loss_func=adapter.compute_loss,
    )
    adapter.attach(trainer)
    return trainer


def make_samples(rows, count):
    seeded = SeededDataset(rows["train"], train_transform(tiny_processor(), AUGMENTATION, with_masks=False), 0)
    return [seeded[index % len(seeded)] for index in range(count)]


def all_state(trainer):
    state = trainer.step.training_state()
    tensors = {f"student.{name}": tensor for name, tensor in trainer.student.state_dict().items()}
    for part in ("criterion", "teacher", "memory_bank"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in state[part].items()}
    for number, values in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
