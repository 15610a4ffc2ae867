"""Where a SIM training step spends its time on a device, how often the host waits for it, and how large a batch may be.

    python benchmarks/profile_step.py --device cuda                                  # r50, 1024 px, batch 16, bf16: minutes
    python benchmarks/profile_step.py --device cuda --case tiny-bf16 --no-largest
    python benchmarks/profile_step.py                                                # the tiny preset on a CPU

The ten operators with the most time of their own, on a GPU its kernels. Waits: calls in which the host stands still until the
GPU has done everything, by the line of Python that makes them. Largest batch: of whole steps, with AdamW, by doubling, then
halving the gap to an eighth.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from measuring import WARM_UPS, seconds
from sim_hf.evaluation import write_results
from sim_hf.training.optimizer import build_optimizer
from speed_step import CASES, Case, SimStep, a_model_and_its_batch, case_of, precision_context


@dataclass(frozen=True)
class Kernel:
    """calls: of one step; share: of the time of all."""

    name: str
    calls: float
    milliseconds: float
    share: float


def step_of(case: Case, batch: dict | None = None) -> tuple[SimStep, dict]:
    """A step with AdamW, and its batch (generated scenes unless given)."""
    model, own_batch = a_model_and_its_batch(case)
    batch = own_batch if batch is None else batch
    step = SimStep(model, case, batch, precision_context(case))
    step.optimizer = build_optimizer(model, learning_rate=1e-4, backbone_lr_multiplier=0.1, weight_decay=0.05)
    return step, batch


def kernels(step: SimStep, steps: int, most: int = 10) -> tuple[list[Kernel], float]:
    """The `most` with the most time, and the milliseconds of all of them in one step."""
    on_gpu = step.case.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step.run()
        if on_gpu:
            torch.cuda.synchronize()
    events: Any = profiler.key_averages()
    if on_gpu:
        events = [x for x in events if x.device_type == DeviceType.CUDA and not getattr(x, "is_user_annotation", False)]
    times = {id(x): x.self_device_time_total if on_gpu else x.self_cpu_time_total for x in events}
    total = sum(times.values()) or 1.0
    ordered = sorted(events, key=lambda x: times[id(x)], reverse=True)[:most]
    found = [Kernel(x.key, x.count / steps, times[id(x)] / 1000 / steps, times[id(x)] / total) for x in ordered]
    return found, total / 1000 / steps


def waits(step: SimStep) -> Counter[str]:
    """File and line -> how often the host waits for the GPU there in one step. Empty on a CPU."""
    found: Counter[str] = Counter()
    if step.case.device != "cuda":
        return found
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            path = Path(warning.filename)
            found[f"{path.parent.name}/{path.name}:{warning.lineno}"] += 1
    return found


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number up to `most` that fits, to an eighth; 0 when not even one does."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(low // 8, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def repeated(batch: dict, count: int) -> dict:
    """A batch of `count` images: these again and again, each with a number of its own."""
    rows = [index % len(batch["labels"]) for index in range(count)]
    labels = [{**batch["labels"][row], "image_id": torch.tensor([index])} for index, row in enumerate(rows)]
    return {**{name: value[rows] for name, value in batch.items() if name != "labels"}, "labels": labels}


def batch_fits(case: Case, batch: dict, count: int) -> bool:
    """Whether two whole steps (the second has the optimizer's state, and something to paste) go through."""
    try:
        step, _ = step_of(Case(**{**asdict(case), "batch_size": 1}), repeated(batch, count))
        step.run()
        step.run()
        taken = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if case.device == "cuda" else ""
        print(f"batch {count}: fits{taken}", flush=True)
        return True
    except RuntimeError as error:  # out of memory, or a tensor too large for a library
        print(f"batch {count}: does not fit ({str(error).partition(chr(10))[0][:150]})", flush=True)
        return False
    finally:
        step = None
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def report(case_name: str, device: str, steps: int) -> tuple[dict[str, Any], dict]:
    """Prints and returns what was measured, and the batch."""
    step, batch = step_of(case_of(case_name, device))
    for _ in range(WARM_UPS[device]):
        step.run()
    took = 1000 * statistics.median(seconds(step.run, device) for _ in range(steps))
    found, busy = kernels(step, steps)
    print(
        f"{case_name} on {device}: {took:.1f} ms a step, {'its kernels' if device == 'cuda' else 'its operators'} {busy:.1f} ms"
    )
    for kernel in found:
        print(f"{kernel.share:7.1%} {kernel.milliseconds:9.2f} ms {kernel.calls:8.1f} calls  {kernel.name[:110]}")
    waiting = waits(step)
    if device == "cuda":
        print(f"the host waits {sum(waiting.values())} times in a step:")
        for place, count in waiting.most_common(25):
            print(f"{count:6}  {place}")
    record = {"case": case_name, "milliseconds": took, "kernel_milliseconds": busy, "kernels": [asdict(x) for x in found]}
    return record | {"waits": dict(waiting)}, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", choices=CASES, help="default: r50-1024-bf16 on a GPU, tiny on a CPU")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--largest", action=argparse.BooleanOptionalAction, help="look for the largest batch (default: on a GPU)")
    parser.add_argument("--most", type=int, default=512, help="no batch above this is tried")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/profile.json"))
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    name = options.case or ("r50-1024-bf16" if on_gpu else "tiny")
    record, batch = report(name, options.device, options.steps)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_results(options.output, {}, extra=record)
    if options.largest if options.largest is not None else on_gpu:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        case = case_of(name, options.device)
        record["largest_batch"] = largest(lambda count: batch_fits(case, batch, count), case.batch_size, options.most)
        print(f"largest batch: {record['largest_batch']}")
        write_results(options.output, {}, extra=record)
    print(torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads", end=", ")
    print(f"torch {torch.__version__}; written: {options.output}")


if __name__ == "__main__":
    main()
