"""`sim-hf demo`: train on boxes only, on two CPU cores in minutes; show the masks and their mask AP, before and after.

Without --data it renders its own photographs; --data takes a folder with images/, instances_train.json and instances_val.json,
one with COCO files as other tools lay them out (`sim-hf convert coco --help`), or the id of a Hub data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sim_hf.demo import DemoOptions, run_demo


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf demo", description=__doc__)
    parser.add_argument("--data", help="folder or Hub data set (default: generated scenes)")
    parser.add_argument("--model", help="checkpoint to start from (default: the project's own, assets/sim-tiny)")
    parser.add_argument("--from-scratch", action="store_true", help="do not start from a checkpoint")
    parser.add_argument("--backbone-weights", help="ImageNet weights of the backbone, with --from-scratch")
    parser.add_argument("--compare", action="store_true", help="also train with the real masks, for comparison")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time that the run must fit into")
    parser.add_argument("--steps", type=int, help="exact number of steps instead of as many as fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="what the demo writes")
    options = parser.parse_args(argv)
    if options.backbone_weights and not options.from_scratch:
        raise ValueError("--backbone-weights needs --from-scratch: the checkpoint brings its own backbone")
    run_demo(DemoOptions(**vars(options)))
    return 0
