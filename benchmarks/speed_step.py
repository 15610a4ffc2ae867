"""The training step beside transformers' own: the whole SIM step from boxes against a fully supervised one.

Ours: student, teacher, optimal transport, pseudo masks, copy-paste, forward and backward. The peer:
`Mask2FormerForUniversalSegmentation` with real masks, forward and backward. Both start from the same weights, and the row is
equal when the two networks give the same logits for the same pictures. Two more rows: the networks alone, in inference, and
how our step grows with the number of instances.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from measuring import Row, compare
from sim_hf import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data import DetectionCollator, SeededDataset, TrainTransform, load_coco, write_scenes
from sim_hf.training.arguments import RunArguments, SupervisionArguments
from sim_hf.training.assembly import build_step
from sim_hf.training.trainer import precision_of


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and the goals: ratios ours / peer."""

    preset: str
    size: int
    batch_size: int
    bf16: bool
    goal: float
    memory_goal: float | None = None


CASES = {
    "tiny": Case("tiny", 256, 8, precision_of("auto") == "bf16", goal=0.5),
    "r50-fp32": Case("r50", 640, 2, bf16=False, goal=1.0, memory_goal=1.0),
    "r50-bf16": Case("r50", 640, 2, bf16=True, goal=0.8, memory_goal=1.0),
}


def step_row(name: str, repeats: int) -> Row:
    """One row of the table: `name` is a key of `CASES`."""
    case = CASES[name]
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
    )
    row.equal = same_logits(model, stock, batch)  # last: it leaves both in evaluation mode
    row.note = f"SIM adds {100 * statistics.median(ours.added[-repeats:]):.1f} % of the step (goal 8 %)"
    return row


def model_row(name: str, repeats: int) -> Row:
    """The two networks in inference on the pictures of `CASES[name]`, without what comes after them."""
    case = CASES[name]
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
    )


def growth_row(repeats: int, num_instances: int = 300) -> Row:
    """Our step with twice the instances in an image: a ratio of 2 is growth in a line. The network's part does not grow."""
    case = replace(CASES["tiny"], batch_size=1)
    model, batch = a_model_and_its_batch(case, num_queries=num_instances)

    def crowded(count: int) -> Callable[[], None]:
        labels = [{**label, **random_objects(count, case.size)} for label in batch["labels"]]
        return SimStep(model, case, {**batch, "labels": labels}, precision_context(case)).run

    return compare(
        f"our training step, {num_instances} instances in an image, tiny: {case.size} px, batch 1",
        f"the same with {num_instances // 2}",
        crowded(num_instances),
        crowded(num_instances // 2),
        equal=True,
        goal=2.0,
        repeats=repeats,
        note="one thing at two sizes: nothing to be equal",
    )


class SimStep:
    """The whole step on one batch, as `TrainingStep` makes it. `added`: for each run, the share of its time outside of the two
    networks' forwards and of the backward."""

    def __init__(self, model: SIMForInstanceSegmentation, case: Case, batch: dict, precision) -> None:
        processor = SIMImageProcessor.from_preset(case.preset)
        run = RunArguments(max_steps=100, batch_size=case.batch_size)
        self.step = build_step(model, processor, SupervisionArguments(pseudo_start=0, paste_probability=0.5), run).train()
        self.model, self.batch, self.precision = model, batch, precision
        self.networks, self.added = 0.0, []
        assert self.step.teacher is not None
        for network in (model, self.step.teacher.model):
            network.register_forward_pre_hook(lambda *_: self._clock(-1))
            network.register_forward_hook(lambda *_: self._clock(1))

    def run(self) -> None:
        step, start, self.networks = self.step, time.perf_counter(), 0.0
        inputs = step.prepare({**self.batch, "labels": [boxes_only(label) for label in self.batch["labels"]]})
        normalizers = step.normalizers([inputs])
        with self.precision:
            output = step(self.model, inputs, normalizers)
        self._clock(-1)
        output.total.backward()
        self._clock(1)
        self.model.zero_grad()
        step.after_update(self.model)
        self.added.append(1 - self.networks / (time.perf_counter() - start))

    def _clock(self, sign: int) -> None:
        self.networks += sign * time.perf_counter()


def stock_network(model: SIMForInstanceSegmentation) -> Mask2FormerForUniversalSegmentation:
    """transformers' network with our weights."""
    fields = model.config.to_dict()
    for name in ("model_type", "freeze_batch_norm", "category_ids"):
        fields.pop(name)
    stock = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**fields)).train()
    stock.load_state_dict(model.state_dict(), strict=False)
    for module in stock.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return stock


def a_model_and_its_batch(case: Case, **overrides: Any) -> tuple[SIMForInstanceSegmentation, dict]:
    """The preset with random weights, in training mode, and generated scenes for it. overrides: fields of its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), num_train=16, num_val=2, progress=False)
        rows = load_coco(Path(folder) / "images", Path(folder) / "instances_train.json", with_masks=True)
        names = rows.features["objects"]["category"].feature.names
        batch = a_batch(rows, case)
    torch.manual_seed(0)
    config = SIMConfig.from_preset(case.preset, id2label=dict(enumerate(names)), **overrides)
    return SIMForInstanceSegmentation(config).train(), batch


def precision_context(case: Case):
    return torch.autocast("cpu", torch.bfloat16) if case.bf16 else nullcontext()


def random_objects(count: int, size: int) -> dict[str, torch.Tensor]:
    """Boxes of 16 to 48 px, wherever they fall; all of the first class."""
    random = torch.Generator().manual_seed(0)
    sizes_N2 = 16 + 32 * torch.rand(count, 2, generator=random)
    corners_N2 = torch.rand(count, 2, generator=random) * (size - sizes_N2)
    return {
        "boxes": torch.cat((corners_N2, corners_N2 + sizes_N2), 1),
        "class_labels": torch.zeros(count, dtype=torch.int64),
    }


def a_batch(rows, case: Case) -> dict:
    """The first pictures under the training augmentation, with boxes and masks."""
    transform = TrainTransform(case.size, with_masks=True)
    samples = SeededDataset(rows, transform)
    processor = SIMImageProcessor.from_preset(case.preset)
    collate = DetectionCollator(processor.image_mean, processor.image_std, pad_to=case.size)
    return collate([samples[i] for i in range(case.batch_size)])


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
    with torch.no_grad():
        ours, theirs = (network(pixel_values=batch["pixel_values"][:1]) for network in (model, stock))
    return torch.allclose(ours.class_queries_logits, theirs.class_queries_logits, atol=1e-3, rtol=1e-3) and torch.allclose(
        ours.masks_queries_logits, theirs.masks_queries_logits, atol=1e-2, rtol=1e-3
    )
