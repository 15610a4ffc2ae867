"""`sim-hf train`: parse, build, call. `scripts/train.py` is the same for `accelerate launch`."""

from __future__ import annotations

from collections.abc import Sequence

from sim_hf.training.arguments import parse_arguments
from sim_hf.training.trainer import train


def main(argv: Sequence[str] | None = None) -> int:
    train(parse_arguments(argv, prog="sim-hf train"))
    return 0
