"""`sim-hf COMMAND ...`: one module a command, each with `main(argv) -> exit code` and its own --help."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from transformers.utils import logging as from_transformers

import sim_hf
from sim_hf.processes import leave_process_group

COMMANDS = {
    "convert": "a YOLO, Pascal VOC or Hub data set as a COCO folder of boxes",
    "check": "find every fault of a COCO file and its images",
    "train": "train from boxes (or masks): the same as scripts/train.py",
    "evaluate": "COCO mask and box AP of a model on a data set",
    "predict": "instances of pictures: overlays and a COCO results file",
    "label": "turn the boxes of a COCO file into masks",
    "export": "a model as an ONNX file, for runtimes without PyTorch",
    "scenes": "write the generated photographs as a COCO folder",
    "push": "a trained model with its card to the Hugging Face Hub",
    "push-dataset": "COCO files and their pictures as a data set of the Hub",
    "push-space": "the folder of a Space to the Hub",
    "demo": "train on boxes only, show masks and mask AP, in minutes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what a user did wrong ends in one line on stderr and exit code 2, not in a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"sim-hf {sim_hf.__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        print(f"sim-hf: error: unknown command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    from_transformers.disable_progress_bar()  # "Loading weights" says nothing about a small model
    # Imported late: a command loads what it needs and no more.
    module = importlib.import_module(f"sim_hf.cli.{command.replace('-', '_')}")
    try:
        code = int(module.main(rest) or 0)
        leave_process_group()
        return code
    except KeyboardInterrupt:
        print("sim-hf: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SIM_HF_TRACEBACK"):
            raise
        print(f"sim-hf {command}: error: {_one_line(error)}", file=sys.stderr)
        print("(SIM_HF_TRACEBACK=1 shows where it came from)", file=sys.stderr)
        return 2


def _usage() -> str:
    lines = [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: sim-hf COMMAND [options]   (sim-hf COMMAND --help for its options)", "", *lines])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
