"""What two ranks do for test_two_processes.py: `torchrun --nproc_per_node 2 worker_two_processes.py FOLDER`."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import TrainingArguments

from factories import make_arguments, prime, tiny_model, tiny_processor
from sim_hf.data import load_coco
from sim_hf.training.arguments import DataArguments, SupervisionArguments
from sim_hf.training.finite import NonFiniteLossError
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.trainer import Trainer


def sim_trainer(folder: Path, output_dir: Path, *, batch_size: int) -> SIMTrainer:
    """A primed run of three steps."""
    rows = {
        split: load_coco(
            folder / "images", folder / f"instances_{split}.json", with_masks=split == "val", cache_dir=folder / "cache"
        )
        for split in ("train", "val")
    }
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=3,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=1.0,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=3,
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = SIMTrainer(
        model=tiny_model(),
        args=arguments,
        supervision=SupervisionArguments(pseudo_start=0.0, num_prototypes=3, paste_probability=0.5),
        image_processor=tiny_processor(),
        train_dataset=rows["train"],
        eval_dataset=rows["val"],
        augmentation=DataArguments(scale_min=0.9, scale_max=1.1),
    )
    prime(trainer.step)
    return trainer


def moving_statistics(folder: Path) -> dict:
    """Both ranks' weights, statistics and teachers after two steps of a network whose BatchNorm is not frozen."""
    trainer = Trainer(make_arguments(folder, folder / "moving", folder / "out_moving", supervision="sim", max_steps=2))
    trainer.train()
    return {**trainer.student.state_dict(), **trainer.step.training_state()["teacher"], **trainer.step.criterion.state_dict()}


def swin_with_activation_checkpointing(folder: Path) -> dict:
    """Weights after two steps of the backbone that has parameters without a gradient in the stock library."""
    arguments = make_arguments(folder, folder / "swin", folder / "out_swin", max_steps=2, activation_checkpointing=True)
    trainer = Trainer(arguments)
    trainer.train()
    return trainer.student.state_dict()


def non_finite_on_one_rank(folder: Path) -> str:
    """The error that this rank raises when the loss of the second one is NaN."""
    trainer = Trainer(make_arguments(folder, folder / "model", folder / "out_nan", max_steps=2))
    loss, rank = trainer.step.loss, trainer.accelerator.process_index

    def poisoned(*args):
        output = loss(*args)
        if rank == 1:
            output.losses["loss_projection"] = output.losses["loss_projection"] * math.nan
        return output

    trainer.step.loss = poisoned
    try:
        trainer.train()
    except NonFiniteLossError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    trainer = sim_trainer(folder, folder / "out_sim", batch_size=1)
    trainer.train()
    metrics = trainer.evaluate()
    rank = trainer.accelerator.process_index
    result = {
        "weights": trainer.student.state_dict(),
        "training_state": trainer.step.training_state(),
        "history": trainer.state.log_history,
        "metrics": {name: value for name, value in metrics.items() if "AP" in name or "AR" in name},
        "moving": moving_statistics(folder),
        "swin": swin_with_activation_checkpointing(folder),
        "non_finite": non_finite_on_one_rank(folder),
    }
    torch.save(result, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
