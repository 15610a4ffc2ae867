"""`SIMTrainer` with push_to_hub: real card, nothing but the model, revisions, private repositories, every habit of Trainer."""

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from factories import make_step, tiny_model, tiny_processor
from sim_hf.data import SeededDataset, load_coco
from sim_hf.hub import HubError, check_model_card
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.arguments import DataArguments, SupervisionArguments
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.loaders import train_collator, train_transform
from sim_hf.training.stock_trainer import CocoEvaluation, StockTrainerAdapter

PUSHED = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def rows(shapes, tmp_path):
    return {
        split: load_coco(shapes / "images", shapes / f"instances_{split}.json", with_masks=split == "val", cache_dir=tmp_path)
        for split in ("train", "val")
    }


def make_trainer(folder, rows, **options):
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "push_to_hub": True,
        "hub_model_id": "ann/trained",
        **options,
    }
    return SIMTrainer(
        model=tiny_model("swin"),
        args=TrainingArguments(output_dir=str(folder), **values),
        supervision=SupervisionArguments(supervision="boxinst"),
        image_processor=tiny_processor(),
        train_dataset=rows["train"],
        eval_dataset=rows["val"],
    )


def test_the_end_of_training_is_pushed_with_a_real_card(hub, rows, tmp_path):
    folder = tmp_path / "out"
    trainer = make_trainer(
        folder, rows, report_to="tensorboard", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.args.hub_strategy = "end"
    trainer.train()
    info = trainer.push_to_hub(license="mit", dataset="shapes", tags="mine")
    assert hub.head("ann/trained") == info.oid and set(hub.files("ann/trained")) == PUSHED
    assert len(hub.repos["models", "ann/trained"].commits) == 2
    loaded = SIMForInstanceSegmentation.from_pretrained("ann/trained").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trainer.exported.state_dict().items())
    card = ModelCard.load("ann/trained")
    check_model_card(str(card))
    card.validate()
    measured = [line for line in trainer.state.log_history if "eval_segm/AP" in line][-1]
    assert f"| AP | {measured['eval_segm/AP']:.3f} | {measured['eval_bbox/AP']:.3f} |" in card.text
    assert "| data | shapes: 8 images, 12 boxes |" in card.text and "Boxes only" in card.text
    assert "| steps | 2 of 2 |" in card.text and "ellipse, rectangle" in card.text and "fill" in card.text
    assert card.data.license == "mit" and "mine" in card.data.tags
    assert str(tmp_path) not in str(card)


def test_every_save_pushes_the_model_of_the_checkpoint_in_the_background(hub, rows, tmp_path):
    trainer = make_trainer(tmp_path / "out", rows, save_strategy="steps", save_steps=1, hub_always_push=True)
    trainer.train()
    repo = hub.repos["models", "ann/trained"]
    titles = [repo.titles[sha] for sha in repo.branches["main"]]
    assert titles == ["initial commit", "Training in progress, step 1", "Training in progress, step 2"]
    assert set(hub.files("ann/trained")) == PUSHED
    loaded = SIMForInstanceSegmentation.from_pretrained("ann/trained").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trainer.exported.state_dict().items())


def test_a_push_in_the_background_that_fails_is_logged_and_ends_no_training(hub, rows, tmp_path, caplog):
    trainer = make_trainer(tmp_path / "out", rows, save_strategy="steps", save_steps=1, hub_private_repo=True, hub_revision="wip")
    hub.fail("POST", "/commit/", "500")
    trainer.train()
    assert "Training in progress, step 1 was not pushed: ann/trained: the Hub answered 500" in caplog.text
    assert trainer.state.global_step == 2
    hub.faults.clear()
    trainer.push_to_hub()
    assert set(hub.files("ann/trained", revision="wip")) == PUSHED and set(hub.files("ann/trained")) == {".gitattributes"}
    assert hub.repos["models", "ann/trained"].private


def test_what_is_wrong_with_the_token_shows_before_training(hub, rows, tmp_path, monkeypatch):
    for token, message in (("", "needs an access token"), ("hf_wrong", "does not know"), ("hf_reader", "may not write")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=message):
            make_trainer(tmp_path / "out", rows)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    with pytest.raises(ValueError, match="'checkpoint' would publish optimiser"):
        make_trainer(tmp_path / "out", rows, hub_strategy="checkpoint")


def test_push_to_hub_works_without_having_been_planned(hub, rows, tmp_path):
    trainer = make_trainer(tmp_path / "small", rows, push_to_hub=False, hub_model_id=None)
    job = trainer.push_to_hub(blocking=False)
    assert job.result().oid == hub.head("ann/small")
    card = hub.files("ann/small")["README.md"].decode()
    assert "# small" in card and "## Results" not in card and "license: unknown" in card


def test_the_adapter_pushes_the_student_of_a_stock_trainer_and_nothing_else(hub, rows, tmp_path):
    processor, model = tiny_processor(), tiny_model()
    adapter = StockTrainerAdapter(make_step(model, "boxinst", max_steps=1), evaluation=CocoEvaluation(processor, rows["val"]))
    samples = SeededDataset(rows["train"], train_transform(processor, DataArguments(), with_masks=False), 0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[samples[0], samples[1]],
        eval_dataset=[samples[2]],
        data_collator=adapter.collator(train_collator(processor)),
        compute_loss_func=adapter.compute_loss,
    )
    adapter.attach(trainer)
    trainer.train()
    info = adapter.push_to_hub(trainer, "ann/stock", processor, supervision="boxinst", license="mit", dataset="shapes")
    assert info.oid == hub.head("ann/stock") and set(hub.files("ann/stock")) == PUSHED
    loaded = SIMForInstanceSegmentation.from_pretrained("ann/stock").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    card = ModelCard.load("ann/stock")
    check_model_card(str(card))
    assert "Boxes only" in card.text and "## Results" in card.text and card.data.license == "mit"
