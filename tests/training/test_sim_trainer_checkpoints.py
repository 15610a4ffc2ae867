"""The checkpoints of SIMTrainer: what goes on from them is the same run, and a damaged one is not used."""

import pytest
import torch
from short_runs import all_state, assert_same_state, sim_trainer

from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.state_files import CheckpointError


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_sim_trainer_resumes_bit_for_bit_in_the_middle_of_an_epoch(backbone, tmp_path, rows):
    options = {"backbone": backbone, "gradient_accumulation_steps": 2, "max_steps": 5, "lr_scheduler_type": "linear"}
    unbroken = sim_trainer(tmp_path, rows, save_strategy="steps", save_steps=3, **options)  # 2 steps an epoch
    unbroken.train()
    resumed = sim_trainer(tmp_path, rows, primed=False, **options)
    torch.rand(100)  # whatever a new process has drawn
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 5
    assert_same_state(all_state(resumed), all_state(unbroken))


def test_a_checkpoint_folder_gives_the_teacher_to_from_pretrained(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, backbone="swin", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = SIMForInstanceSegmentation.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    teacher = trainer.teacher.model.state_dict()
    assert loaded.keys() == teacher.keys()
    assert all(torch.equal(loaded[name], teacher[name]) for name in teacher)
    assert any(not torch.equal(tensor, teacher[name]) for name, tensor in trainer.student.state_dict().items())


def test_the_best_model_is_loaded_whole_at_the_end(tmp_path, rows, monkeypatch):
    """The stock Trainer would leave most of a Swin backbone as it was, with a warning."""

    def evaluate(self, **options):
        self.control.should_evaluate = False
        return {"eval_score": -self.state.global_step}

    monkeypatch.setattr(SIMTrainer, "evaluate", evaluate)
    trainer = sim_trainer(
        tmp_path,
        rows,
        backbone="swin",
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()
    best = SIMForInstanceSegmentation.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.student.state_dict().items())
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.exported.state_dict().items())


def test_resume_true_skips_a_checkpoint_that_was_cut_off(tmp_path, rows):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "name": "boxinst"}
    unbroken = sim_trainer(tmp_path, rows, **options)
    unbroken.train()
    for step in (2, 3):
        file = tmp_path / f"checkpoint-{step}" / "training_state.json"
        file.write_text(file.read_text()[:100])
    resumed = sim_trainer(tmp_path, rows, name="boxinst", max_steps=3)
    assert resumed._newest_complete_checkpoint().endswith("checkpoint-1")
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(t, unbroken.student.state_dict()[n]) for n, t in resumed.student.state_dict().items())
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint among the 3"):
        sim_trainer(tmp_path, rows, name="boxinst").train(resume_from_checkpoint=True)


def test_sim_trainer_does_not_resume_from_a_flipped_byte(tmp_path, rows):
    sim_trainer(tmp_path, rows, name="boxinst", max_steps=2, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resumed = sim_trainer(tmp_path, rows, name="boxinst", max_steps=3)
    assert resumed._newest_complete_checkpoint().endswith("checkpoint-1")
    with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be used: .*optimizer\.pt has changed"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_only_the_newest_checkpoints_stay(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, name="boxinst", save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert trainer.args.save_total_limit == 2
