"""`sim-hf export`: a model as an ONNX file, for runtimes without PyTorch (needs `pip install 'sim-hf[onnx]'`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sim_hf.models.architectures import load_model
from sim_hf.onnx_export import export_onnx


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf export", description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("--output", required=True, type=Path, help="the .onnx file")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the inputs (default: any; Swin needs one)",
    )
    options = parser.parse_args(argv)
    model = load_model(options.model, dtype=torch.float32)
    export_onnx(model, options.output, options.size and tuple(options.size))
    print(f"{options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")
    return 0
