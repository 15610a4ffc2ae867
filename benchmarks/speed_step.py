"""The training step beside transformers' own: the whole SIM step from boxes against a fully supervised one.

Ours: student, teacher, optimal transport, pseudo masks, copy-paste, forward and backward. The peer:
`Mask2FormerForUniversalSegmentation` with real masks, forward and backward. Both start from the same weights, and the row is
equal when the two networks give the same logits for the same pictures. Two more rows: the networks alone, in inference, and
how our step grows with the number of instances.

On a GPU the times are those of steps that nobody watches; what the parts take is read in further steps, in which the host
waits for the device at both ends of each part.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from measuring import WARM_UPS, Row, compare, now, seconds
from sim_hf import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data import DetectionCollator, SeededDataset, TrainTransform, load_coco, write_scenes
from sim_hf.training.arguments import RunArguments, SupervisionArguments
from sim_hf.training.assembly import build_step
from sim_hf.training.trainer import precision_of


@dataclass(frozen=True)
class Case:
    """A network, its inputs, the device, and the goals: ratios ours / peer."""

    preset: str
    size: int
    batch_size: int
    bf16: bool
    goal: float
    memory_goal: float | None = None
    device: str = "cpu"


CASES = {
    "tiny": Case("tiny", 256, 8, precision_of("auto") == "bf16", goal=0.5),
    "r50-fp32": Case("r50", 640, 2, bf16=False, goal=1.0, memory_goal=1.0),
    "r50-bf16": Case("r50", 640, 2, bf16=True, goal=0.8, memory_goal=1.0),
    "tiny-fp32": Case("tiny", 256, 8, bf16=False, goal=0.5),
    "tiny-bf16": Case("tiny", 256, 8, bf16=True, goal=0.5),
    "r50-1024-bf16": Case("r50", 1024, 16, bf16=True, goal=0.8, memory_goal=1.0),
}


def case_of(name: str, device: str = "cpu", batch_size: int | None = None) -> Case:
    """`CASES[name]` on this device, with another batch size if given."""
    case = CASES[name]
    return replace(case, device=device, batch_size=batch_size or case.batch_size)


def step_row(name: str, repeats: int, device: str = "cpu") -> Row:
    """One row of the table: `name` is a key of `CASES`. On a GPU whose memory does not hold both sides' batch, of half of it."""
    case = case_of(name, device)
    while True:
        try:
            return _step_row(name, case, repeats)
        except torch.OutOfMemoryError:
            if device == "cpu" or case.batch_size == 1:
                raise
        print(f"batch {case.batch_size} does not fit", flush=True)
        case = replace(case, batch_size=case.batch_size // 2)
        gc.collect()
        torch.cuda.empty_cache()


def _step_row(name: str, case: Case, repeats: int) -> Row:
    model, batch = a_model_and_its_batch(case)
    stock = stock_network(model)
    precision = precision_context(case)
    ours = SimStep(model, case, batch, precision)
    row = compare(
        f"training step, {name}: {case.size} px, batch {case.batch_size}, {'bf16' if case.bf16 else 'fp32'}",
        "transformers' Mask2Former, fully supervised",
        ours.run,
        lambda: stock_step(stock, batch, precision),
        equal=False,
        goal=case.goal,
        memory_goal=case.memory_goal,
        repeats=repeats,
        device=case.device,
    )
    if case.device == "cpu":
        row.note = f"SIM adds {100 * statistics.median(ours.added[-repeats:]):.1f} % of the step (goal 8 %)"
    else:
        row.note = _shares(ours, SimStep(model, case, batch, precision, supervision="full"), repeats)
    row.equal = same_logits(model, stock, batch)  # last: it leaves both in evaluation mode
    return row


def _shares(ours: SimStep, full: SimStep, repeats: int) -> str:
    """Of our step what SIM adds and the teacher's forward, and our step beside our own fully supervised one, in turns. Then with
    sure masks: those of a fresh network are gray, so next to no pseudo masks come of them, and nothing is remembered."""
    added, teacher = _watched(ours, repeats)
    said = (
        f"SIM adds {added:.1f} % of the step (goal 8 %); the teacher's forward is {teacher:.1f} %; {_ratio(ours, full, repeats)}"
    )
    with sure_masks(ours):
        added, _ = _watched(ours, repeats)
        bank = ours.step.memory_bank
        remembered = 0 if bank is None else len(bank)
        return f"{said}; with sure masks ({remembered} images remembered) SIM adds {added:.1f} %, {_ratio(ours, full, repeats)}"


def _watched(step: SimStep, repeats: int) -> tuple[float, float]:
    """Percent of a step that SIM adds, and that the teacher's forward takes."""
    step.watches = True
    for _ in range(repeats + 1):  # the first does not count
        step.run()
    step.watches = False
    added, teacher = (100 * statistics.median(shares[-repeats:]) for shares in (step.added, step.teacher))
    return added, teacher


def _ratio(ours: SimStep, full: SimStep, repeats: int) -> str:
    device = ours.case.device
    for _ in range(WARM_UPS[device]):
        ours.run(), full.run()
    times = [(seconds(ours.run, device), seconds(full.run, device)) for _ in range(repeats)]
    sim, own = (statistics.median(column) for column in zip(*times, strict=True))
    return f"SIM/full ratio {sim / own:.2f} ({sim:.4f} / {own:.4f} s)"


@contextmanager
def sure_masks(step: SimStep) -> Iterator[None]:
    """Student and teacher with the last layer of their mask embedding times a power of two, which is exact in both directions."""
    assert step.step.teacher is not None
    networks = [step.model, step.step.teacher.model]
    embedders = [network.model.transformer_module.decoder.mask_predictor.mask_embedder for network in networks]
    last = [[layer for layer in embedder.modules() if isinstance(layer, torch.nn.Linear)][-1] for embedder in embedders]

    def scale(factor: float) -> None:
        with torch.no_grad():
            for layer in last:
                layer.weight.mul_(factor)
                layer.bias.mul_(factor)

    scale(1024.0)
    try:
        yield
    finally:
        scale(1 / 1024)


def model_row(name: str, repeats: int, device: str = "cpu") -> Row:
    """The two networks in inference on the pictures of `CASES[name]`, without what comes after them."""
    case = case_of(name, device)
    model, batch = a_model_and_its_batch(case)
    stock = stock_network(model)
    equal = same_logits(model, stock, batch)  # leaves both in evaluation mode

    @torch.inference_mode()
    def infer(network: torch.nn.Module) -> None:
        with precision_context(case):
            network(pixel_values=batch["pixel_values"])

    return compare(
        f"inference, network alone, {name}: {case.size} px, batch {case.batch_size}, {'bf16' if case.bf16 else 'fp32'}",
        "transformers' Mask2Former",
        lambda: infer(model),
        lambda: infer(stock),
        equal=equal,
        goal=None,
        repeats=repeats,
        device=device,
    )


def growth_row(repeats: int, num_instances: int = 300, device: str = "cpu") -> Row:
    """Our step with twice the instances in an image: a ratio of 2 is growth in a line. The network's part does not grow."""
    case = case_of("tiny", device, batch_size=1)
    model, batch = a_model_and_its_batch(case, num_queries=num_instances)

    def crowded(count: int) -> Callable[[], None]:
        objects = to_device(random_objects(count, case.size), case.device)
        labels = [{**label, **objects} for label in batch["labels"]]
        return SimStep(model, case, {**batch, "labels": labels}, precision_context(case)).run

    return compare(
        f"our training step, {num_instances} instances in an image, tiny: {case.size} px, batch 1",
        f"the same with {num_instances // 2}",
        crowded(num_instances),
        crowded(num_instances // 2),
        equal=True,
        goal=2.0,
        repeats=repeats,
        device=device,
        note="one thing at two sizes: nothing to be equal",
    )


class SimStep:
    """The whole step on one batch, as `TrainingStep` makes it. While it `watches` (on a CPU always), for each run, `added`: the
    share of its time outside of the two networks' forwards and of the backward; `teacher`: that of the teacher's forward. The
    rows of the table have no optimizer, as that is the same for both sides."""

    def __init__(
        self, model: SIMForInstanceSegmentation, case: Case, batch: dict, precision, *, supervision: str = "sim"
    ) -> None:
        processor = SIMImageProcessor.from_preset(case.preset)
        run = RunArguments(max_steps=100, batch_size=case.batch_size)
        options = SupervisionArguments(supervision=supervision, pseudo_start=0, paste_probability=0.5)
        self.step = build_step(model, processor, options, run).to(case.device).train()
        self.model, self.case, self.batch, self.precision = model, case, batch, precision
        self.with_masks = supervision == "full"
        self.watches = case.device == "cpu"
        self.optimizer: torch.optim.Optimizer | None = None
        self.networks = self.of_teacher = 0.0
        self.added, self.teacher = [], []
        assert self.step.teacher is not None
        teacher = self.step.teacher.model
        for network in (model, teacher):
            network.register_forward_pre_hook(lambda *_, network=network: self._clock(-1, network is teacher))
            network.register_forward_hook(lambda *_, network=network: self._clock(1, network is teacher))

    def run(self) -> None:
        step, self.networks, self.of_teacher = self.step, 0.0, 0.0
        start = now(self.case.device) if self.watches else 0.0
        labels = self.batch["labels"] if self.with_masks else [boxes_only(label) for label in self.batch["labels"]]
        inputs = step.prepare({**self.batch, "labels": labels})
        normalizers = step.normalizers([inputs])
        with self.precision:
            output = step(self.model, inputs, normalizers)
        self._clock(-1)
        output.total.backward()
        self._clock(1)
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad()
        step.after_update(self.model)
        if self.watches:
            whole = now(self.case.device) - start
            self.added.append(1 - self.networks / whole)
            self.teacher.append(self.of_teacher / whole)

    def _clock(self, sign: int, is_teacher: bool = False) -> None:
        if self.watches:
            time = sign * now(self.case.device)
            self.networks += time
            self.of_teacher += time if is_teacher else 0.0


def stock_network(model: SIMForInstanceSegmentation) -> Mask2FormerForUniversalSegmentation:
    """transformers' network with our weights."""
    fields = model.config.to_dict()
    for name in ("model_type", "freeze_batch_norm", "category_ids"):
        fields.pop(name)
    stock = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**fields)).train().to(model.device)
    stock.load_state_dict(model.state_dict(), strict=False)
    for module in stock.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return stock


def a_model_and_its_batch(case: Case, **overrides: Any) -> tuple[SIMForInstanceSegmentation, dict]:
    """The preset with random weights, in training mode, and generated scenes for it, on the case's device. overrides: fields of
    its configuration."""
    names, batch = _scenes(case.preset, case.size, case.batch_size)
    torch.manual_seed(0)
    config = SIMConfig.from_preset(case.preset, id2label=dict(enumerate(names)), **overrides)
    return SIMForInstanceSegmentation(config).train().to(case.device), to_device(batch, case.device)


@lru_cache(maxsize=4)
def _scenes(preset: str, size: int, batch_size: int) -> tuple[list[str], dict]:
    """Names of classes, and the first pictures under the training augmentation, with boxes and masks."""
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), num_train=16, num_val=2, progress=False)
        rows = load_coco(Path(folder) / "images", Path(folder) / "instances_train.json", with_masks=True)
        names = rows.features["objects"]["category"].feature.names
        samples = SeededDataset(rows, TrainTransform(size, with_masks=True))
        processor = SIMImageProcessor.from_preset(preset)
        collate = DetectionCollator(processor.image_mean, processor.image_std, pad_to=size)
        return names, collate([samples[i] for i in range(batch_size)])


def to_device(value: Any, device: str) -> Any:
    """Dictionaries and lists of tensors, moved. The number of an image stays with the host, as in training."""
    if isinstance(value, dict):
        return {name: part if name == "image_id" else to_device(part, device) for name, part in value.items()}
    return [to_device(part, device) for part in value] if isinstance(value, list) else value.to(device)


def precision_context(case: Case):
    return torch.autocast(case.device, torch.bfloat16) if case.bf16 else nullcontext()


def random_objects(count: int, size: int) -> dict[str, torch.Tensor]:
    """Boxes of 16 to 48 px, wherever they fall; all of the first class."""
    random = torch.Generator().manual_seed(0)
    sizes_N2 = 16 + 32 * torch.rand(count, 2, generator=random)
    corners_N2 = torch.rand(count, 2, generator=random) * (size - sizes_N2)
    return {
        "boxes": torch.cat((corners_N2, corners_N2 + sizes_N2), 1),
        "class_labels": torch.zeros(count, dtype=torch.int64),
    }


def boxes_only(label: dict) -> dict:
    return {name: value for name, value in label.items() if name not in ("masks", "has_mask")}


def stock_step(stock: Mask2FormerForUniversalSegmentation, batch: dict, precision) -> None:
    labels = batch["labels"]
    with precision:
        output = stock(
            pixel_values=batch["pixel_values"],
            pixel_mask=batch["pixel_mask"].long(),
            mask_labels=[label["masks"].float() for label in labels],
            class_labels=[label["class_labels"] for label in labels],
            output_auxiliary_logits=True,
        )
    output.loss.backward()
    stock.zero_grad()


def same_logits(model, stock, batch: dict) -> bool:
    """In fp32, evaluation mode, without padding (which transformers' network does not leave out everywhere)."""
    model.eval()
    stock.eval()
    with torch.no_grad(), exact_convolutions():
        ours, theirs = (network(pixel_values=batch["pixel_values"][:1]) for network in (model, stock))
    return torch.allclose(ours.class_queries_logits, theirs.class_queries_logits, atol=1e-3, rtol=1e-3) and torch.allclose(
        ours.masks_queries_logits, theirs.masks_queries_logits, atol=1e-2, rtol=1e-3
    )


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """A GPU's convolutions in float32: otherwise they keep 10 bits of their inputs, and no two ways agree to more."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
