"""Speed and memory beside the peers: one table, every row with a check that both give the same result.

    python benchmarks/speed.py                             # the short form: minutes
    python benchmarks/speed.py --rows step-r50-fp32 step-r50-bf16    # ResNet-50, 640 px, batch 2: some minutes on two cores
    python benchmarks/speed.py --rows all --data FOLDER    # everything, on the photographs of a COCO folder
    python benchmarks/speed.py --device cuda               # on a GPU: its own rows, minutes

Both sides run in this process, in turns. Times are medians; memory is the peak above what was there; ratios are ours / peer.
Written to runs/bench/speed.json (speed-cuda.json) after every row, with the machine, the versions and the commit. The note of
a row whose goal is not reached says where the time goes. On a GPU a row that fails says so, and the others follow.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from measuring import Row
from sim_hf.evaluation import write_results
from sim_hf.evaluation.results import git_state, machine, package_versions
from speed_evaluation import evaluation_rows
from speed_inference import end_to_end_row, inference_rows, picture_of, post_processing_rows
from speed_loading import loading_rows
from speed_step import growth_row, model_row, step_row
from speed_supervision import many_instances_rows, part_rows, supervision_rows


@dataclass(frozen=True)
class Settings:
    """repeats: timings of each side. data: a COCO folder (images/ + instances_val.json) whose photographs are used, None for
    generated scenes. device: "cpu" or "cuda"."""

    repeats: int
    data: Path | None
    device: str = "cpu"


def _step(name: str, settings: Settings) -> list[Row]:
    return [step_row(name, settings.repeats, settings.device)]


def _model(name: str, settings: Settings) -> list[Row]:
    return [model_row(name, settings.repeats, settings.device)]


ROWS: dict[str, Callable[[Settings], list[Row]]] = {
    "step-tiny": partial(_step, "tiny"),
    "step-r50-fp32": partial(_step, "r50-fp32"),
    "step-r50-bf16": partial(_step, "r50-bf16"),
    "model-tiny": partial(_model, "tiny"),
    "model-r50-fp32": partial(_model, "r50-fp32"),
    "model-r50-bf16": partial(_model, "r50-bf16"),
    "growth": lambda settings: [growth_row(settings.repeats, device=settings.device)],
    "supervision": lambda settings: supervision_rows(settings.repeats, settings.data, device=settings.device),
    "inference": lambda settings: inference_rows(settings.repeats, settings.data, device=settings.device),
    "loading": lambda settings: loading_rows(settings.repeats, settings.data),
    "evaluation-500": lambda settings: evaluation_rows(settings.repeats, num_images=500, num_objects=3600),
    "evaluation-5000": lambda settings: evaluation_rows(1),
}
GPU_ROWS: dict[str, Callable[[Settings], list[Row]]] = {
    "step-r50-1024-bf16": partial(_step, "r50-1024-bf16"),
    "step-r50-bf16": ROWS["step-r50-bf16"],
    "step-r50-fp32": ROWS["step-r50-fp32"],
    "step-tiny-bf16": partial(_step, "tiny-bf16"),
    "step-tiny-fp32": partial(_step, "tiny-fp32"),
    "picture": lambda settings: [end_to_end_row(settings.repeats, picture_of(settings.data), "r50", settings.device)],
    "post-processing": lambda settings: post_processing_rows(settings.repeats, device=settings.device),
    "model-r50-bf16": ROWS["model-r50-bf16"],
    "model-r50-fp32": ROWS["model-r50-fp32"],
    "supervision": lambda settings: part_rows(settings.repeats, settings.data, device=settings.device),
    "growth": ROWS["growth"],
    "supervision-growth": lambda settings: many_instances_rows(settings.repeats, settings.data, device=settings.device),
    "model-r50-1024-bf16": partial(_model, "r50-1024-bf16"),
}
SHORT = ("step-tiny", "supervision", "inference", "loading", "evaluation-500")
REPEATS = {"cpu": 3, "cuda": 10}


def table(rows: list[Row]) -> str:
    lines = [f"{'part':58} {'ours s':>9} {'peer s':>9} {'ratio':>6} {'goal':>5} {'memory':>7} {'goal':>5}  equal"]
    for row in rows:
        lines.append(
            f"{row.part:58} {row.ours_seconds:9.4f} {row.peer_seconds:9.4f} {row.ratio:6.3f} {_number(row.goal)}"
            f" {_number(row.memory_ratio):>7} {_number(row.memory_goal)}  {'yes' if row.equal else 'NO'}"
        )
        lines.append(f"    peer: {row.peer}" + (f"; {row.note}" if row.note else ""))
    return "\n".join(lines)


def circumstances(device: str = "cpu") -> str:
    """Machine, versions and commit in two lines."""
    hardware, git, versions = machine(), git_state(), package_versions()
    changed = " and uncommitted changes" if git["dirty"] else ""
    names = ("python", "torch", "transformers", "pycocotools")
    gpu = f"{torch.cuda.get_device_name()}; " if device == "cuda" else ""
    return (
        f"{gpu}{hardware['cpu']}, {hardware['cpu_count']} cores, {hardware['threads']} threads; "
        f"commit {git['commit'][:12]}{changed}\n" + ", ".join(f"{name} {versions[name]}" for name in names)
    )


def _number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>5}"


def measured(name: str, settings: Settings) -> tuple[list[Row], str | None]:
    """Rows, and on a GPU, instead of an exception, what went wrong: there a run may be short, and the next row may fit."""
    try:
        return (GPU_ROWS if settings.device == "cuda" else ROWS)[name](settings), None
    except Exception as error:
        if settings.device == "cpu":
            raise
        traceback.print_exc()
        return [], f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", nargs="+", choices=[*dict.fromkeys([*ROWS, *GPU_ROWS]), "all"])
    parser.add_argument("--repeats", type=int, help="timings of each side; the table has their medians (3, on a GPU 10)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after these no further row is begun")
    parser.add_argument("--data", type=Path, help="a COCO folder with photographs (default: generated scenes)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    known = GPU_ROWS if device == "cuda" else ROWS
    names = arguments.rows or (list(GPU_ROWS) if device == "cuda" else list(SHORT))
    names = list(known) if "all" in names else names
    if not known.keys() >= set(names):
        parser.error(f"on {device} the rows are {', '.join(known)}")
    output = arguments.output or Path("runs/bench") / ("speed.json" if device == "cpu" else f"speed-{device}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(arguments.repeats or REPEATS[device], arguments.data, device)
    rows: list[Row] = []
    failures: dict[str, str] = {}
    start = time.perf_counter()
    for name in names:
        elapsed = time.perf_counter() - start
        if elapsed > 60 * arguments.minutes:
            print(f"{name} was not begun: {elapsed:.0f} s", flush=True)
            continue
        print(f"measuring {name} ({elapsed:.0f} s) ...", flush=True)
        found, failure = measured(name, settings)
        rows += found
        if failure is not None:
            failures[name] = failure
            print(f"{name} failed: {failure}", flush=True)
        elif device == "cuda":
            print(table(found), flush=True)
        extra = {"rows": [asdict(row) for row in rows]} | ({"failures": failures} if failures else {})
        write_results(output, {}, extra=extra)
    print(table(rows))
    print(circumstances(device))
    for name, failure in failures.items():
        print(f"{name} failed: {failure}")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
