"""The network as an ONNX file, for runtimes without PyTorch.

Everything that an image goes through between the image processor and the post-processing is in it: `pixel_values` (B, 3, H, W)
float32 and `pixel_mask` (B, H, W) int64 go in, `class_queries_logits` (B, Q, K + 1) and `masks_queries_logits` (B, Q, H/4, W/4)
come out, for any number of images, and any height and width that are multiples of 32.

Shape letters: B images, Q queries, K classes, H W rows and columns of the padded input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sim_hf.models.sim import SIMForInstanceSegmentation

INPUTS = ("pixel_values", "pixel_mask")
OUTPUTS = ("class_queries_logits", "masks_queries_logits")
OPSET = 18  # GridSample is in every runtime of it
_STRIDE = 32  # of the coarsest map
_FREE = {"batch": 1024, "rows_of_32": 256, "columns_of_32": 256}


class _PlainOutputs(nn.Module):
    def __init__(self, model: SIMForInstanceSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values, pixel_mask)
        return tuple(outputs[name] for name in OUTPUTS)


def export_program(model: SIMForInstanceSegmentation) -> torch.export.ExportedProgram:
    """The network as torch.export's program, for any number of images and any height and width that are multiples of 32."""
    plain = _PlainOutputs(model).eval()
    device = next(model.parameters()).device
    # Two images, the second with padding; a single one, or a square, would be taken for what always comes.
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64, device=device)
    pixel_mask[1, 32:] = 0
    batch, rows, columns = (torch.export.Dim(name, min=1, max=limit) for name, limit in _FREE.items())
    shapes = {0: batch, 2: _STRIDE * rows, 3: _STRIDE * columns}
    with torch.no_grad():
        return torch.export.export(
            plain,
            (torch.zeros(2, 3, 64, 96, device=device), pixel_mask),
            dynamic_shapes={"pixel_values": shapes, "pixel_mask": {0: batch, 1: shapes[2], 2: shapes[3]}},
            strict=False,
        )


def export_onnx(model: SIMForInstanceSegmentation, path: str | Path) -> None:
    """Write the network as one .onnx file. Needs the extra `onnx`."""
    was_training = model.training
    try:
        exported = torch.onnx.export(
            export_program(model),
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except (ImportError, torch.onnx.OnnxExporterError) as error:
        if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
            raise ValueError("ONNX needs the packages onnx and onnxscript: pip install 'sim-hf[onnx]'") from error
        raise
    finally:
        model.train(was_training)
    if exported is None:
        raise RuntimeError("torch.onnx.export gave no program")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    exported.save(str(path))
