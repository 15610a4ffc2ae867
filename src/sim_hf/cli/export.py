"""`sim-hf export`: a model as an ONNX file, for runtimes without PyTorch (needs `pip install 'sim-hf[onnx]'`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.onnx_export import export_onnx, input_size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf export", description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("--output", required=True, type=Path, help="the .onnx file")
    parser.add_argument("--height", type=int, help="of the inputs, a multiple of 32 (default: every resized image fits)")
    parser.add_argument("--width", type=int, help="the same for their width")
    options = parser.parse_args(argv)
    model = SIMForInstanceSegmentation.from_pretrained(options.model, dtype=torch.float32)
    height, width = options.height, options.width
    if height is None or width is None:
        default = input_size(SIMImageProcessor.from_pretrained(options.model))
        height, width = height or default[0], width or default[1]
    export_onnx(model, options.output, (height, width))
    print(f"inputs of {height} x {width} -> {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")
    return 0
