"""What a CPU cannot show: training, evaluation, labelling and prediction on CUDA, in every precision, beside the CPU's results.

pytest -m gpu tests/gpu        # under a minute
"""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from factories import (
    SIZE,
    make_arguments,
    make_batch,
    make_step,
    prime,
    save_tiny_model,
    tiny_condinst,
    tiny_model,
    tiny_processor,
    write_shapes,
)
from sim_hf.data import load_coco
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.labeling import masks_for_boxes
from sim_hf.mask_generation import PrototypeBank
from sim_hf.mask_generation.copy_paste import copy_paste
from sim_hf.structures import InstanceTargets
from sim_hf.training.trainer import Trainer

DEVICE = "cuda"
SUPERVISIONS = ("sim", "boxinst", "level_set", "bbtp", "full")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")]


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """In float32, not TF32: the CPU's results are the measure."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def moved(value, device=DEVICE):
    """Dictionaries and lists of tensors on a device."""
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return [moved(part, device) for part in value] if isinstance(value, list) else value.to(device)


def step_on(device, network, supervision, **options):
    """A training step and its network; for SIM with prototypes and a filled bank, which are made on the CPU for both devices."""
    step = make_step(network.train(), supervision, **options)
    if supervision == "sim":
        prime(step)
    step.to(device)
    step.teacher.model.to(device)
    return step, network.to(device)


def losses_and_gradients(step, network, batch):
    """Named losses of two steps (what the first has remembered acts in the second) and the gradient of both."""
    losses = {}
    for turn in range(2):
        inputs = step.prepare(batch)
        output = step(network, inputs, step.normalizers([inputs]))
        output.total.backward()
        losses |= {f"{name}, step {turn}": loss.detach().cpu() for name, loss in output.losses.items()}
        step.after_update(network)
    gradients = {name: p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None}
    return losses, gradients


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_losses_and_gradients_are_those_of_the_cpu(supervision):
    batch = make_batch(4, with_masks=supervision == "full")
    results = [
        losses_and_gradients(*step_on(device, tiny_model(contrast=10.0), supervision), moved(batch, device))
        for device in ("cpu", DEVICE)
    ]
    (expected, expected_gradients), (found, gradients) = results
    assert found.keys() == expected.keys() and gradients.keys() == expected_gradients.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=2e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    whole, expected_whole = (torch.cat([x.flatten() for x in part.values()]) for part in (gradients, expected_gradients))
    assert (whole - expected_whole).norm() < 0.02 * expected_whole.norm()


def test_condinst_has_the_losses_of_the_cpu():
    batch = make_batch(4)
    results = [
        losses_and_gradients(*step_on(device, tiny_condinst(), "sim"), moved(batch, device))[0] for device in ("cpu", DEVICE)
    ]
    for name, loss in results[0].items():
        torch.testing.assert_close(results[1][name], loss, rtol=5e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_training_is_finite_and_its_loss_falls(supervision, precision, data, model, tmp_path):
    """All images in every step, and next to no pasting, so that steps can be compared."""
    options = {"supervision": supervision, "mixed_precision": precision, "batch_size": 4, "max_steps": 20}
    options |= {"learning_rate": 1e-3, "lr_schedule": "constant", "paste_probability": 1e-9, "scale_min": 1.0, "scale_max": 1.0}
    trainer = Trainer(make_arguments(data, model, tmp_path, **options))
    assert trainer.accelerator.device.type == DEVICE
    if supervision == "sim":
        prime(trainer.step)
    trainer.model.train()
    trainer.step.train()
    stream = iter(trainer.batches)
    records = [trainer.optimizer_step(stream) for _ in range(20)]
    assert all(math.isfinite(value) for record in records for name, value in record.items() if name != "gradient_norm")
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in trainer.student.parameters())
    assert all(parameter.isfinite().all() for parameter in trainer.step.teacher.model.parameters())
    assert trainer.step.global_step >= (5 if precision == "fp16" else 20)  # fp16 skips updates until its scale fits
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])


def test_a_whole_run_with_pasting_second_phase_evaluation_and_export(data, model, tmp_path):
    options = {"supervision": "sim", "mixed_precision": "bf16", "max_steps": 6, "second_phase": 0.5, "pairwise_warmup": 0.0}
    trainer = Trainer(make_arguments(data, model, tmp_path, **options, eval_every=0.5))
    prime(trainer.step)
    metrics = trainer.train()
    assert trainer.step.global_step == 6 and trainer.step.second_phase
    assert 0 <= metrics["segm/AP"] <= 1 and (tmp_path / "model" / "model.safetensors").is_file()


def numbers(state, name=""):
    """Nests of tensors and numbers, flat: path -> value."""
    if isinstance(state, dict):
        return {path: value for key, part in state.items() for path, value in numbers(part, f"{name}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {path: value for key, part in enumerate(state) for path, value in numbers(part, f"{name}/{key}").items()}
    return {name: state}


def largest_difference(found, expected):
    """Of all floating-point tensors; everything else must be equal. Prototypes and the memory bank decide by thresholds, where
    rounding may tip the balance: they act on the weights, which are looked at."""
    found, expected = numbers(found), numbers(expected)
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert found[name] == value, name
        elif "memory_bank" in name or "criterion" in name:
            continue
        elif not value.is_floating_point():
            assert torch.equal(found[name].cpu(), value.cpu()), name
        elif value.numel():
            largest = max(largest, float((found[name].cpu().double() - value.cpu().double()).abs().max()))
    return largest


@pytest.mark.parametrize("supervision", ["boxinst", "sim"])
def test_a_run_in_two_parts_is_as_near_to_an_unbroken_one_as_a_second_unbroken_one(supervision, data, model, tmp_path):
    """Atomics add in any order, so on a GPU two runs of one seed differ, too; with deterministic algorithms they may not."""
    options = {"supervision": supervision, "max_steps": 4, "batch_size": 2, "pseudo_start": 0.5, "paste_probability": 0.0}

    def run(folder, **more):
        trainer = Trainer(make_arguments(data, model, tmp_path / folder, **options, **more))
        trainer.train()
        return copy.deepcopy(trainer.resumer._state())

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole, again = run("whole"), run("again")
        run("parts", stop_after=2)
        parts = run("parts", resume="auto")
    finally:
        torch.use_deterministic_algorithms(False)
    usual, resumed = largest_difference(again, whole), largest_difference(parts, whole)
    print(f"{supervision}: two unbroken runs differ by {usual:.2e}, one in two parts by {resumed:.2e}")
    assert resumed <= max(10 * usual, 1e-3 if usual else 0.0)


def test_pasting_gives_the_same_pictures_and_targets_as_on_the_cpu():
    step = prime(make_step(tiny_model(), "sim"))
    batch = make_batch(6)
    results = []
    for device in ("cpu", DEVICE):
        there = moved(batch, device)
        targets = InstanceTargets.from_labels(there["labels"], (SIZE, SIZE))
        images = torch.linspace(0, 1, 6 * 3 * SIZE * SIZE, device="cpu").view(6, 3, SIZE, SIZE).to(device)
        keys = list(range(6))
        pasted, after = copy_paste(
            images, there["pixel_mask"], targets, step.memory_bank, seed=0, step=3, image_keys=keys, probability=1.0
        )
        assert pasted.device.type == after.boxes_G4.device.type == device and after.is_pasted_G.any()
        results.append((pasted.cpu(), *(getattr(after, name).cpu() for name in ("boxes_G4", "class_labels_G", "masks_GHW"))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_prototypes_move_as_on_the_cpu():
    """Every class has as many pixels around each of four centres: no pixel lies between two prototypes, where the last bit of a
    float32 would decide which one it moves."""
    generator = torch.Generator().manual_seed(0)
    centres_NC = torch.randn(3 * 4, 16, generator=generator)
    banks = {device: PrototypeBank(3, 4, 16, momentum=0.9).to(device) for device in ("cpu", DEVICE)}
    for _ in range(5):
        centre_M = torch.arange(3 * 4).repeat(20)
        pixels_MC = centres_NC[centre_M] + 0.05 * torch.randn(len(centre_M), 16, generator=generator)
        for device, bank in banks.items():
            bank.observe(pixels_MC.to(device), (centre_M // 4).to(device))
            bank.commit()
    torch.testing.assert_close(banks[DEVICE].prototypes_KLC.cpu(), banks["cpu"].prototypes_KLC, rtol=0, atol=1e-4)
    assert torch.equal(banks[DEVICE].counts_KL.cpu(), banks["cpu"].counts_KL)


@pytest.fixture(scope="module")
def pictures(data):
    return [Image.open(path).convert("RGB") for path in sorted((data / "images").glob("*.png"))]


def overlap(first, second):
    return (first & second).sum() / max((first | second).sum(), 1)


def test_the_pipeline_finds_on_cuda_what_it_finds_on_the_cpu(pictures):
    found = {
        device: pipeline("instance-segmentation", tiny_model(), image_processor=tiny_processor(), device=device, threshold=0.02)(
            pictures, batch_size=2
        )
        for device in ("cpu", DEVICE)
    }
    for here, there in zip(found["cpu"], found[DEVICE], strict=True):
        assert len(here) > 1 and abs(len(here) - len(there)) <= 1
        twins = [
            any(
                own["label"] == other["label"]
                and abs(own["score"] - other["score"]) < 5e-3
                and overlap(own["mask"], other["mask"]) > 0.97
                for other in there
            )
            for own in here
        ]
        assert np.mean(twins) >= 0.9


def test_given_boxes_get_the_same_masks_on_cuda(pictures):
    boxes = [[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 54.0, 46.0]]
    for picture in pictures[:2]:
        here, there = (
            masks_for_boxes(tiny_model().eval().to(device), tiny_processor(), picture, boxes) for device in ("cpu", DEVICE)
        )
        torch.testing.assert_close(there.confidence_n, here.confidence_n, rtol=0, atol=5e-3)
        assert (there.masks() != here.masks()).float().mean() < 5e-3


def test_evaluation_on_cuda_gives_the_numbers_of_the_cpu(data):
    rows = load_coco(data / "images", data / "instances_val.json")
    here, there = (
        evaluate_model(tiny_model().eval().to(device), tiny_processor(), rows, data / "instances_val.json", progress=None)[0]
        for device in ("cpu", DEVICE)
    )
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert there[name] == (None if value is None else pytest.approx(value, abs=0.05)), name
