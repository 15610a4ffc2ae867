"""The forms of deformable attention side by side: time forward and with its backward, memory, equality with transformers' own.

    python benchmarks/deformable_attention.py --device cuda                       # about a minute
    python benchmarks/deformable_attention.py --device cuda --tiles 512 1024 2048 # the Triton kernels with other blocks, too

The package takes the Triton kernels on CUDA, and `CUDA_FALLBACK` where they do not work. Errors are those of the values and
of the gradients of values, locations and weights: length of the difference from transformers' function in float32 on the same
numbers, divided by its length. In half precision the result itself is rounded, to 0.002 (bfloat16) of its length.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from measuring import peak_mib, seconds
from sim_hf.evaluation import write_results
from sim_hf.models.sim import deformable_attention_triton
from sim_hf.models.sim.deformable_attention import FORMS

STRIDES, NUM_POINTS, HEAD_DIM = (32, 16, 8), 4, 32  # of the presets
SPREAD = 2.0  # standard deviation of a point from its cell, in cells of each level
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    name: str
    size: int
    batch_size: int
    num_heads: int


CASES = {
    "tiny": Case("tiny, 256 px, batch 8", 256, 8, 4),
    "r50-640": Case("r50, 640 px, batch 2", 640, 2, 8),
    "r50-1024": Case("r50, 1024 px, batch 16", 1024, 16, 8),
}


@dataclass
class Line:
    """Milliseconds, MiB, and the largest of the four errors."""

    case: str
    dtype: str
    form: str
    forward: float
    both: float
    mib: float
    error: float
    equal: bool


class Problem:
    """value (B, M, A, D), locations and weights as a network makes them, all wanting gradients."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shapes = [(case.size // stride, case.size // stride) for stride in STRIDES]
        heads = (case.batch_size, sum(height * width for height, width in self.shapes), case.num_heads)
        points = (len(STRIDES), NUM_POINTS)
        self.value = torch.randn(*heads, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        centres = [torch.cartesian_prod(*((torch.arange(side) + 0.5) / side for side in shape)).flip(1) for shape in self.shapes]
        sizes_L2 = torch.tensor([(width, height) for height, width in self.shapes])
        moves = SPREAD * torch.randn(*heads, *points, 2, generator=generator) / sizes_L2[:, None]
        self.locations = (torch.cat(centres)[:, None, None, None] + moves).to(device).requires_grad_()
        weights = torch.randn(*heads, points[0] * points[1], generator=generator).softmax(-1)
        self.weights = weights.unflatten(-1, points).to(device).requires_grad_()
        self.direction = torch.randn(*heads, HEAD_DIM, generator=generator).to(device, dtype)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    def forward(self, form: Callable) -> Tensor:
        with torch.no_grad():
            return form(self.value, self.shapes, self.locations, self.weights)

    def both(self, form: Callable) -> list[Tensor]:
        sums = form(self.value, self.shapes, self.locations, self.weights)
        return [sums.detach(), *torch.autograd.grad(sums, self.leaves, self.direction.view_as(sums))]

    def reference(self) -> list[Tensor]:
        value = self.value.detach().float().requires_grad_()
        sums = FORMS["grid_sample"](value, self.shapes, self.locations, self.weights)
        return [sums.detach(), *torch.autograd.grad(sums, (value, *self.leaves[1:]), self.direction.float().view_as(sums))]


@contextmanager
def tile(size: int) -> Iterator[None]:
    before, deformable_attention_triton.TILE = deformable_attention_triton.TILE, size
    try:
        yield
    finally:
        deformable_attention_triton.TILE = before


def lines_of(case: Case, dtype: torch.dtype, device: str, repeats: int, tiles: list[int]) -> Iterator[Line]:
    problem = Problem(case, dtype, device)
    expected = problem.reference()
    forms = [(name, deformable_attention_triton.TILE) for name in FORMS] + [("triton", size) for size in tiles]
    for name, size in forms:
        with tile(size):
            try:
                yield _line(problem, case, dtype, name, device, repeats, expected)
            except Exception as error:  # one form out of memory or not compiled: the others still count
                traceback.print_exc()
                print(f"{case.name}, {dtype}, {name}: {type(error).__name__}", flush=True)


def _line(problem: Problem, case: Case, dtype: torch.dtype, name: str, device: str, repeats: int, expected: list[Tensor]) -> Line:
    form = FORMS[name]
    errors = [
        float((mine.float() - right.view_as(mine)).norm() / right.norm())
        for mine, right in zip(problem.both(form), expected, strict=True)
    ]
    calls = (lambda: problem.forward(form), lambda: problem.both(form))
    for call in calls:
        call()
    forward, both = (1000 * statistics.median(seconds(call, device) for _ in range(repeats)) for call in calls)
    title = name if name != "triton" else f"triton, tile {deformable_attention_triton.TILE}"
    mib = peak_mib(calls[1], device)
    return Line(
        case.name, str(dtype).removeprefix("torch."), title, forward, both, mib, max(errors), max(errors) <= ALLOWED[dtype]
    )


def table(lines: list[Line]) -> str:
    rows = [f"{'case':24} {'dtype':9} {'form':18} {'forward ms':>11} {'both ms':>9} {'MiB':>9} {'error':>9}  equal"]
    for line in lines:
        rows.append(
            f"{line.case:24} {line.dtype:9} {line.form:18} {line.forward:11.3f} {line.both:9.3f} {line.mib:9.1f}"
            f" {line.error:9.1e}  {'yes' if line.equal else 'NO'}"
        )
    return "\n".join(rows)


def verdict(lines: list[Line]) -> str:
    """The fastest form of each case and dtype."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.case, line.dtype), []).append(line)
    best = [min(group, key=lambda line: line.both) for group in groups.values()]
    return "fastest with its backward: " + "; ".join(f"{line.case}, {line.dtype}: {line.form}" for line in best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all on a GPU, tiny on a CPU")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tiles", nargs="*", type=int, default=[])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/deformable_attention.json"))
    options = parser.parse_args()
    lines: list[Line] = []
    for name in options.cases or (CASES if options.device == "cuda" else ["tiny"]):
        for dtype in options.dtypes:
            found = list(lines_of(CASES[name], getattr(torch, dtype), options.device, options.repeats, options.tiles))
            print(table(found), flush=True)
            lines += found
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_results(options.output, {}, extra={"lines": [asdict(line) for line in lines]})
    print(table(lines))
    print(verdict(lines))
    print(torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads", end=", ")
    print(f"torch {torch.__version__}; written: {options.output}")


if __name__ == "__main__":
    main()
