"""Time and memory of a training step beside transformers' own Mask2Former: same weights, inputs and machine, one process.

    python benchmarks/speed.py                      # the tiny preset, 256 px, batch 8, bf16 where the processor computes in it
    python benchmarks/speed.py --rows r50-fp32 r50-bf16    # ResNet-50, 640 px, batch 2: some minutes on two cores

The peer is transformers' fully supervised step: `Mask2FormerForUniversalSegmentation` with real masks, forward and backward.
Ours is the whole SIM step from boxes: student, teacher, optimal transport, pseudo masks, copy-paste, forward and backward.
Both start from the same weights, and the row is `equal` when the two networks give the same logits for the same pictures.
The two take turns, so that what else the machine does hits both; times are medians, memory is the peak above what was there.
Written to runs/bench/speed.json.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from sim_hf import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data import DetectionCollator, SeededDataset, TrainTransform, load_coco, write_scenes
from sim_hf.evaluation import write_results
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


@dataclass
class Row:
    part: str
    peer: str
    ours_seconds: float
    peer_seconds: float
    ratio: float
    goal: float
    ours_mib: float
    peer_mib: float
    memory_ratio: float
    added_by_sim: float
    equal: bool


def measure(name: str, case: Case, folder: Path, repeats: int) -> Row:
    """One row of the table."""
    torch.manual_seed(0)
    rows = load_coco(folder / "images", folder / "instances_train.json", with_masks=True)
    names = rows.features["objects"]["category"].feature.names
    config = SIMConfig.from_preset(case.preset, id2label=dict(enumerate(names)))
    model = SIMForInstanceSegmentation(config).train()
    stock = stock_network(model)
    batch = a_batch(rows, case)
    precision = torch.autocast("cpu", torch.bfloat16) if case.bf16 else nullcontext()
    parts = SimStep(model, case, batch, precision)
    peer = lambda: stock_step(stock, batch, precision)  # noqa: E731
    parts.run(), peer()  # warm
    ours_mib, peer_mib = peak_mib(parts.run), peak_mib(peer)
    ours, theirs, shares = [], [], []
    for _ in range(repeats):
        theirs.append(seconds(peer))
        parts.networks = 0.0
        ours.append(seconds(parts.run))
        shares.append(1 - parts.networks / ours[-1])
    return Row(
        part=f"training step, {name}: {case.size} px, batch {case.batch_size}, {'bf16' if case.bf16 else 'fp32'}",
        peer="transformers' Mask2Former, fully supervised",
        ours_seconds=statistics.median(ours),
        peer_seconds=statistics.median(theirs),
        ratio=statistics.median(ours) / statistics.median(theirs),
        goal=case.goal,
        ours_mib=ours_mib,
        peer_mib=peer_mib,
        memory_ratio=ours_mib / peer_mib,
        added_by_sim=statistics.median(shares),
        equal=same_logits(model, stock, batch),
    )


class SimStep:
    """The whole step on one batch. `networks` collects the seconds of the two networks' forwards and of the backward."""

    def __init__(self, model: SIMForInstanceSegmentation, case: Case, batch: dict, precision) -> None:
        processor = SIMImageProcessor.from_preset(case.preset)
        run = RunArguments(max_steps=100, batch_size=case.batch_size)
        self.step = build_step(model, processor, SupervisionArguments(pseudo_start=0), run).train()
        self.model, self.batch, self.precision, self.networks = model, batch, precision, 0.0

    def run(self) -> None:
        step = self.step
        inputs = step.prepare({**self.batch, "labels": [boxes_only(label) for label in self.batch["labels"]]})
        normalizers = step.normalizers([inputs])
        with self.precision:
            network = {"pixel_values": inputs.pixel_values_BCHW, "pixel_mask": inputs.pixel_mask_BHW}
            student = self._timed(lambda: self.model(**network, output_auxiliary_logits=True))
            teacher = step.teacher
            assert teacher is not None
            answer = self._timed(lambda: teacher(**network, output_auxiliary_logits=True))
            step.teacher = lambda **_: answer  # the criterion asks for it: it was made, and timed, above
            output = step.loss(student, inputs, normalizers)
            step.teacher = teacher
        self._timed(output.total.backward)
        self.model.zero_grad()
        step.after_update(self.model)

    def _timed(self, call: Callable):
        start = time.perf_counter()
        result = call()
        self.networks += time.perf_counter() - start
        return result


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
    model.eval(), stock.eval()
    with torch.no_grad():
        ours, theirs = (network(pixel_values=batch["pixel_values"][:1]) for network in (model, stock))
    return torch.allclose(ours.class_queries_logits, theirs.class_queries_logits, atol=1e-3, rtol=1e-3) and torch.allclose(
        ours.masks_queries_logits, theirs.masks_queries_logits, atol=1e-2, rtol=1e-3
    )


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_mib(call: Callable[[], None]) -> float:
    """Peak resident memory while `call` runs, above what was resident before (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = status_kib("VmRSS")
    call()
    return (status_kib("VmHWM") - before) / 1024


def status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(CASES), default=["tiny"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/speed.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), num_train=16, num_val=2)
        rows = [measure(name, CASES[name], Path(folder), arguments.repeats) for name in arguments.rows]
    print(f"{'part':52} {'ours s':>8} {'peer s':>8} {'ratio':>6} {'goal':>5} {'memory':>7} {'SIM adds':>9} equal")
    for row in rows:
        print(
            f"{row.part:52} {row.ours_seconds:8.2f} {row.peer_seconds:8.2f} {row.ratio:6.2f} {row.goal:5.2f}"
            f" {row.memory_ratio:7.2f} {100 * row.added_by_sim:8.1f}% {'yes' if row.equal else 'NO'}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_results(arguments.output, {}, extra={"rows": [asdict(row) for row in rows]})
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
