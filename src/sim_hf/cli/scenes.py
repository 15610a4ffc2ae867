"""`sim-hf scenes`: write the project's generated photographs, with exact boxes and masks, as a COCO folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sim_hf.data.scenes import write_scenes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf scenes", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to: images/, instances_train.json, instances_val.json")
    parser.add_argument("--train", type=int, default=400, help="number of training scenes")
    parser.add_argument("--val", type=int, default=100, help="number of validation scenes")
    parser.add_argument("--size", type=int, default=256, help="longest side in pixels")
    parser.add_argument("--difficulty", type=float, default=1.0, help="0 (plain backgrounds) to 1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    path = write_scenes(
        options.folder,
        num_train=options.train,
        num_val=options.val,
        seed=options.seed,
        size=options.size,
        difficulty=options.difficulty,
    )
    print(f"{options.train} + {options.val} scenes in {path}")
    return 0
