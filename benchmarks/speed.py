"""Speed and memory beside the peers: one table, every row with a check that both give the same result.

    python benchmarks/speed.py                             # the short form: minutes
    python benchmarks/speed.py --rows step-r50-fp32 step-r50-bf16    # ResNet-50, 640 px, batch 2: some minutes on two cores
    python benchmarks/speed.py --rows all --data FOLDER    # everything, on the photographs of a COCO folder

Both sides run in this process, in turns. Times are medians; memory is the peak above what was there; ratios are ours / peer.
Written to runs/bench/speed.json, with the machine, the versions and the commit. The note of a row whose goal is not reached
says where the time goes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import Row
from sim_hf.evaluation import write_results
from sim_hf.evaluation.results import git_state, machine, package_versions
from speed_evaluation import evaluation_rows
from speed_inference import inference_rows
from speed_loading import loading_rows
from speed_step import growth_row, model_row, step_row
from speed_supervision import supervision_rows


@dataclass(frozen=True)
class Settings:
    """repeats: timings of each side. data: a COCO folder (images/ + instances_val.json) whose photographs are used, None for
    generated scenes."""

    repeats: int
    data: Path | None


ROWS: dict[str, Callable[[Settings], list[Row]]] = {
    "step-tiny": lambda settings: [step_row("tiny", settings.repeats)],
    "step-r50-fp32": lambda settings: [step_row("r50-fp32", settings.repeats)],
    "step-r50-bf16": lambda settings: [step_row("r50-bf16", settings.repeats)],
    "model-tiny": lambda settings: [model_row("tiny", settings.repeats)],
    "model-r50-fp32": lambda settings: [model_row("r50-fp32", settings.repeats)],
    "model-r50-bf16": lambda settings: [model_row("r50-bf16", settings.repeats)],
    "growth": lambda settings: [growth_row(settings.repeats)],
    "supervision": lambda settings: supervision_rows(settings.repeats, settings.data),
    "inference": lambda settings: inference_rows(settings.repeats, settings.data),
    "loading": lambda settings: loading_rows(settings.repeats, settings.data),
    "evaluation-500": lambda settings: evaluation_rows(settings.repeats, num_images=500, num_objects=3600),
    "evaluation-5000": lambda settings: evaluation_rows(1),
}
SHORT = ("step-tiny", "supervision", "inference", "loading", "evaluation-500")


def table(rows: list[Row]) -> str:
    lines = [f"{'part':58} {'ours s':>9} {'peer s':>9} {'ratio':>6} {'goal':>5} {'memory':>7} {'goal':>5}  equal"]
    for row in rows:
        lines.append(
            f"{row.part:58} {row.ours_seconds:9.4f} {row.peer_seconds:9.4f} {row.ratio:6.3f} {_number(row.goal)}"
            f" {_number(row.memory_ratio):>7} {_number(row.memory_goal)}  {'yes' if row.equal else 'NO'}"
        )
        lines.append(f"    peer: {row.peer}" + (f"; {row.note}" if row.note else ""))
    return "\n".join(lines)


def circumstances() -> str:
    """Machine, versions and commit in two lines."""
    hardware, git, versions = machine(), git_state(), package_versions()
    changed = " and uncommitted changes" if git["dirty"] else ""
    names = ("python", "torch", "transformers", "pycocotools")
    return (
        f"{hardware['cpu']}, {hardware['cpu_count']} cores, {hardware['threads']} threads; commit {git['commit'][:12]}{changed}\n"
        + ", ".join(f"{name} {versions[name]}" for name in names)
    )


def _number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>5}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "all"], default=list(SHORT))
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side; the table has their medians")
    parser.add_argument("--data", type=Path, help="a COCO folder with photographs (default: generated scenes)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/speed.json"))
    arguments = parser.parse_args()
    settings = Settings(arguments.repeats, arguments.data)
    rows: list[Row] = []
    start = time.perf_counter()
    for name in ROWS if "all" in arguments.rows else arguments.rows:
        print(f"measuring {name} ({time.perf_counter() - start:.0f} s) ...", flush=True)
        rows += ROWS[name](settings)
    print(table(rows))
    print(circumstances())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_results(arguments.output, {}, extra={"rows": [asdict(row) for row in rows]})
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
