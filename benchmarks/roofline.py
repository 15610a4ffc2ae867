"""How far the training step is from what the machine can do: operations and bytes of our step and of its peer against measured
limits.

    python benchmarks/roofline.py                 # the tiny preset
    python benchmarks/roofline.py --case r50-bf16

Limits: the rate of a large matrix product, the rate of copying memory, the time of an operator on one number. Counted per
step, forward and backward: floating-point operations of products and convolutions, bytes that all operators read and write
(each reads its inputs from memory and writes its result there; views are free), and calls of operators. The three times say
what the step would take if it had nothing else to do; their sum is what separate operators cannot be below by much.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from measuring import seconds
from speed_step import CASES, SimStep, a_model_and_its_batch, precision_context, stock_network, stock_step


class Count(TorchDispatchMode):
    """Operations, bytes and calls of the operators in it; views and allocations move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if not function.is_view and packet.__name__ not in ("empty", "empty_strided", "empty_like", "detach"):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
            self.bytes += sum(map(_size, tensors.values()))
            self.calls += 1
        return result


def _size(tensor: torch.Tensor) -> int:
    """Bytes in memory; an expanded tensor has more elements than that."""
    if tensor.layout is not torch.strided:
        return tensor._nnz() * (tensor.element_size() + 8)
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def limits(dtype: torch.dtype) -> dict[str, float]:
    """Operations and bytes per second, and seconds of an operator that does nothing worth mentioning."""
    size = 2048
    left, right = torch.randn(2, size, size).to(dtype)
    source, target = torch.zeros(2, 64 * 2**20)
    number = torch.zeros(1)
    return {
        "flops": 2 * size**3 / _best(lambda: left @ right),
        "bytes": 2 * source.numel() * 4 / _best(lambda: target.copy_(source)),
        "call": _best(lambda: [number.add_(1) for _ in range(1000)]) / 1000,
    }


def _best(work: Callable[[], object], repeats: int = 7) -> float:
    return min(seconds(work) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    case = CASES[options.case]
    model, batch = a_model_and_its_batch(case)
    stock, precision = stock_network(model), precision_context(case)
    works = {"ours": SimStep(model, case, batch, precision).run, "peer": lambda: stock_step(stock, batch, precision)}
    can = limits(torch.bfloat16 if case.bf16 else torch.float32)
    print(f"{torch.get_num_threads()} threads: {can['flops'] / 1e9:.0f} GFLOP/s, {can['bytes'] / 1e9:.1f} GB/s, ", end="")
    print(f"{can['call'] * 1e6:.1f} us a call; {time.strftime('%Y-%m-%d')}, torch {torch.__version__}")
    names = "".join(f"{name:>10}" for name in ("products", "memory", "calls", "sum", "took"))
    print(f"{options.case:10} {'GFLOP':>8} {'GB':>8} {'calls':>8} |{names}  seconds")
    for name, work in works.items():
        work()
        with Count() as needs:
            work()
        took = _best(work, options.repeats)
        times = [needs.flops / can["flops"], needs.bytes / can["bytes"], needs.calls * can["call"]]
        columns = " ".join(f"{value:9.3f}" for value in (*times, sum(times), took))
        print(f"{name:10} {needs.flops / 1e9:8.1f} {needs.bytes / 1e9:8.2f} {needs.calls:8} | {columns}")


if __name__ == "__main__":
    main()
