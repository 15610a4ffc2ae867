"""01 kill-matrix: SIGKILL at every file operation of what `SIMTrainer` saves and of an exported model folder."""

import os
import shutil
import signal

import pytest
import torch
from transformers import TrainingArguments

from factories import tiny_model, tiny_processor
from killing import in_child, kill_at_file_operation
from sim_hf.data import load_coco
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.arguments import SupervisionArguments
from sim_hf.training.checkpoint import verify
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.periodic import save_model_folder

STRIDE = 3  # a save of the stock trainer has some hundred file operations; a prime stride meets every kind in a run or two


def killed_at(number, folder, action) -> bool:
    """Whether SIGKILL came before `action` was over."""

    def run():
        kill_at_file_operation(number, folder)
        action()

    status = in_child(run)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


@pytest.mark.e2e
def test_01_kill_at_any_file_operation_of_a_sim_trainer_save(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    rows = load_coco(data / "images", data / "instances_train.json", cache_dir=tmp_path / "cache")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=1, save_total_limit=1,
    )  # fmt: skip
    supervision = SupervisionArguments(supervision="boxinst")
    trainer = SIMTrainer(tiny_model(), arguments, supervision=supervision, image_processor=tiny_processor(), train_dataset=rows)
    trainer.train()
    kills = 0
    for number in range(1, 1000, STRIDE):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        trainer.state.global_step = 1
        trainer._save_checkpoint(trainer.model, None)
        trainer.state.global_step = 2
        killed = killed_at(number, tmp_path / "run", lambda: trainer._save_checkpoint(trainer.model, None))
        newest = trainer._newest_complete_checkpoint()
        assert verify(newest) == [] and (killed or newest.endswith("checkpoint-2"))
        if not killed:
            break
        kills += 1
    assert kills >= 10


@pytest.mark.e2e
def test_01_kill_at_any_file_operation_of_an_export(tmp_path):
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    processor, weight = tiny_processor(), next(iter(old.state_dict()))
    kills = 0
    for number in range(1, 200):
        target = tmp_path / str(number) / "model"
        save_model_folder(old, processor, target)
        killed = killed_at(number, target.parent, lambda target=target: save_model_folder(new, processor, target))
        folders = [path for path in (target, target.with_name(".model.old")) if path.exists()]
        found = SIMForInstanceSegmentation.from_pretrained(folders[0]).state_dict()[weight]
        assert any(torch.equal(found, model.state_dict()[weight]) for model in ((old, new) if killed else (new,)))
        # Killed again at once, before the new one is there: what the first kill left stays.
        killed_at(9, target.parent, lambda target=target: save_model_folder(new, processor, target))
        SIMForInstanceSegmentation.from_pretrained(target)
        save_model_folder(new, processor, target)
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        shutil.rmtree(target.parent)
        if not killed:
            break
        kills += 1
    assert kills >= 8
