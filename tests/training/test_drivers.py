"""The three drivers: the Accelerate loop, SIMTrainer and a stock transformers.Trainer with the adapter."""

import json
import math

import pytest
import torch
from transformers import Trainer as StockTrainer
from transformers import TrainingArguments

from factories import make_arguments, make_step, prime, save_tiny_model, tiny_model, tiny_processor, write_shapes
from sim_hf.data import SeededDataset, StepSampler, load_coco
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.arguments import DataArguments, SupervisionArguments
from sim_hf.training.finite import NonFiniteLossError
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.loaders import train_collator, train_transform
from sim_hf.training.optimizer import build_optimizer, build_scheduler
from sim_hf.training.state_files import CheckpointError
from sim_hf.training.stock_trainer import StockTrainerAdapter
from sim_hf.training.trainer import Trainer

AUGMENTATION = DataArguments(scale_min=0.9, scale_max=1.1)
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=7)


@pytest.fixture(scope="module")
def rows(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {split: load_coco(data / "images", data / f"instances_{split}.json", cache_dir=cache) for split in ("train", "val")}


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


def run_accelerate_loop(tmp_path, data, name):
    model = save_tiny_model(tmp_path / "start")
    trainer = Trainer(
        make_arguments(
            data, model, tmp_path / "loop", supervision=name, max_steps=STEPS, lr_schedule="constant", export="student"
        )
    )
    if name == "sim":
        prime(trainer.step)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "loop" / "metrics.jsonl").read_text().splitlines()]
    return trainer.step, trainer.student, named_losses(lines)


def run_sim_trainer(tmp_path, rows, name):
    trainer = sim_trainer(tmp_path / "sim", rows, name=name)
    trainer.train()
    return trainer.step, trainer.student, named_losses(trainer.state.log_history)


def run_stock_trainer(tmp_path, rows, name):
    model = tiny_model()
    step = make_step(model, name, max_steps=STEPS)
    if name == "sim":
        prime(step)
    adapter = StockTrainerAdapter(step)
    seeded = SeededDataset(rows["train"], train_transform(tiny_processor(), AUGMENTATION, with_masks=False), 0)
    stream = iter(StepSampler(len(seeded), 2, seed=0))
    samples = [seeded[key] for _ in range(STEPS) for key in next(stream)]
    optimizer = build_optimizer(model, learning_rate=5e-4, backbone_lr_multiplier=0.2, weight_decay=0.05)
    scheduler = build_scheduler(optimizer, schedule="constant", warmup_steps=0, max_steps=STEPS)
    trainer = StockTrainer(
        model,
        hf_arguments(tmp_path / "stock", remove_unused_columns=False, train_sampling_strategy="sequential"),
        train_dataset=samples,
        data_collator=adapter.collator(train_collator(tiny_processor())),
        compute_loss_func=adapter.compute_loss,
        optimizers=(optimizer, scheduler),
    )
    adapter.attach(trainer)
    trainer.train()
    return step, model, named_losses(trainer.state.log_history)


@pytest.mark.parametrize("name", ["boxinst", "sim"])
def test_three_drivers_give_the_same_losses_weights_and_state(name, tmp_path, data, rows):
    runs = [
        run_accelerate_loop(tmp_path, data, name),
        run_sim_trainer(tmp_path, rows, name),
        run_stock_trainer(tmp_path, rows, name),
    ]
    reference_step, reference, reference_losses = runs[0]
    assert len(reference_losses) == STEPS
    if name == "sim":
        assert reference_losses[0]["loss_pseudo_mask"] > 0
    for step, model, losses in runs[1:]:
        for found, expected in zip(losses, reference_losses, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for key, tensor in reference.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=1e-6, msg=lambda t, k=key: f"{k}: {t}")
        for key, tensor in reference_step.teacher.state_dict().items():
            torch.testing.assert_close(step.teacher.state_dict()[key], tensor, rtol=0, atol=1e-6)
        assert step.global_step == reference_step.global_step == STEPS
        if name == "sim":
            assert step.memory_bank.image_keys == reference_step.memory_bank.image_keys


def test_sim_trainer_gives_the_same_weights_for_every_split_of_a_step(tmp_path, rows):
    runs = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = sim_trainer(
            tmp_path / str(size),
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            adam_epsilon=1.0,  # or Adam would blow up the rounding of gradients near zero
            learning_rate=1e-2,
        )
        trainer.train()
        assert trainer.step.global_step == trainer.step.teacher.num_ticks == 2
        runs.append(trainer)
    reference = runs[0]
    for trainer in runs[1:]:
        for found, expected in zip(trainer.state.log_history[:2], reference.state.log_history[:2], strict=True):
            names = [name for name in expected if name in ("loss", "grad_norm", "step") or name.startswith("loss_")]
            assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-4)
        for name, tensor in reference.student.state_dict().items():
            found = trainer.student.state_dict()[name]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_sim_trainer_logs_every_loss_and_they_add_up(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, logging_steps=2, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    terms = {"loss_cross_entropy", "loss_projection", "loss_pairwise", "loss_pseudo_mask", "loss_paste"}
    assert terms <= line.keys()
    assert sum(value for name, value in line.items() if name.startswith("loss_")) == pytest.approx(line["loss"], rel=1e-5)


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sim_trainer_stops_before_the_update_when_a_loss_is_not_finite(value, tmp_path, rows, monkeypatch):
    trainer = sim_trainer(tmp_path, rows, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    loss = trainer.step.loss
    before = {}

    def poisoned(*args):
        output = loss(*args)
        if trainer.step.global_step == 1:
            before.setdefault("state", {n: t.clone() for n, t in trainer.student.state_dict().items()})
            before.setdefault("teacher", {n: t.clone() for n, t in trainer.teacher.state_dict().items()})
            output.losses["loss_projection"] = output.losses["loss_projection"] * value
        return output

    monkeypatch.setattr(trainer.step, "loss", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*loss_projection.*images \[\d, \d, \d, \d\]"):
        trainer.train()
    assert all(torch.equal(tensor, before["state"][name]) for name, tensor in trainer.student.state_dict().items())
    assert all(torch.equal(tensor, before["teacher"][name]) for name, tensor in trainer.teacher.state_dict().items())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_skipped_update_does_not_tick(tmp_path, rows, monkeypatch):
    trainer = sim_trainer(tmp_path, rows, max_steps=2)
    images = trainer.step.memory_bank.image_keys
    skipped = property(lambda accelerator: True)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.train()
    assert (trainer.step.global_step, trainer.step.teacher.num_ticks) == (0, 0)
    assert trainer.step.memory_bank.image_keys == images


def test_sim_trainer_trains_in_bfloat16(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, bf16=True, max_steps=1)
    trainer.train()
    assert all(math.isfinite(value) for value in named_losses(trainer.state.log_history)[0].values())
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in trainer.student.parameters())


def test_epochs_cover_the_data_set_in_whole_steps(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows, name="boxinst", max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    seen = []
    prepare = trainer.step.prepare
    trainer.step.prepare = lambda batch: seen.append([int(label["image_id"]) for label in batch["labels"]]) or prepare(batch)
    trainer.train()
    images = [image for batch in seen for image in batch]
    assert trainer.step.global_step == 4  # 7 images, 4 a step
    assert len(images) == 16
    assert sorted(images[:7]) == sorted(images[7:14]) == list(range(1, 8))  # an epoch ends inside a step


def test_evaluation_gives_the_numbers_of_evaluate_model(tmp_path, rows):
    trainer = sim_trainer(tmp_path, rows)
    expected, _ = evaluate_model(trainer.teacher.model, tiny_processor(), rows["val"], progress=None)
    found = trainer.evaluate()
    assert {name: found[f"eval_{name}"] for name, value in expected.items() if value is not None} == {
        name: value for name, value in expected.items() if value is not None
    }
    several = trainer.evaluate({"a": rows["val"], "b": rows["val"]})
    assert several["eval_a_bbox/AP"] == several["eval_b_bbox/AP"] == found["eval_bbox/AP"]


def test_several_gpus_in_one_process_are_refused(tmp_path, rows):
    arguments = hf_arguments(tmp_path)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="one process for each"):
        SIMTrainer(model=tiny_model(), args=arguments, image_processor=tiny_processor(), train_dataset=rows["train"])


def test_trainers_of_transformers_refuse_fsdp(tmp_path, rows, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    model = tiny_model()
    with pytest.raises(ValueError, match="FSDP is not supported here"):
        SIMTrainer(model=model, args=hf_arguments(tmp_path), image_processor=tiny_processor(), train_dataset=rows["train"])
    adapter = StockTrainerAdapter(make_step(model, "boxinst"))
    with pytest.raises(ValueError, match="FSDP is not supported here"):
        adapter.callback.on_train_begin(hf_arguments(tmp_path), None, None, model=model, optimizer=None)


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


def test_stock_trainer_resumes_a_swin_with_the_adapter(tmp_path, rows):
    samples = make_samples(rows, 8)
    states = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        model = tiny_model("swin")
        step = make_step(model, max_steps=4)
        adapter = StockTrainerAdapter(step)
        trainer = stock_trainer(tmp_path, samples, adapter, model, max_steps=4, save_strategy="steps", save_steps=2)
        if checkpoint is None:
            prime(step)
            trainer.train()
        else:
            adapter.load(checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint))
        states.append({**model.state_dict(), **{f"teacher.{n}": t for n, t in step.teacher.state_dict().items()}})
        assert step.global_step == 4
    assert_same_state(states[1], states[0])


def test_stock_accumulation_averages_the_micro_batches(tmp_path, rows):
    model = tiny_model()
    adapter = StockTrainerAdapter(make_step(model, "boxinst", max_steps=1))
    trainer = stock_trainer(tmp_path, make_samples(rows, 4), adapter, model, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    assert adapter.step.global_step == 1
    losses = []
    for samples in (trainer.train_dataset[:2], trainer.train_dataset[2:]):
        fresh = tiny_model().train()
        step = make_step(fresh, "boxinst", max_steps=1)
        inputs = step.prepare(train_collator(tiny_processor())(samples))
        losses.append(float(step(fresh, inputs, step.normalizers([inputs])).total.detach()))
    logged = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert logged == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_stock_trainer_without_the_hook_is_told_so(tmp_path, rows):
    model = tiny_model()
    adapter = StockTrainerAdapter(make_step(model, "boxinst"))
    trainer = StockTrainer(
        model,
        hf_arguments(tmp_path, remove_unused_columns=False),
        train_dataset=make_samples(rows, 4),
        data_collator=train_collator(tiny_processor()),
        compute_loss_func=adapter.compute_loss,
    )
    with pytest.raises(RuntimeError, match=r"adapter\.attach"):
        trainer.train()
