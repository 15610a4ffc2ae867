"""The network as an ONNX file, for runtimes without PyTorch.

Everything that an image goes through between the image processor and the post-processing is in it: `pixel_values` (B, 3, H, W)
float32 and `pixel_mask` (B, H, W) int64 go in, `class_queries_logits` (B, Q, K + 1) and `masks_queries_logits` (B, Q, H/4, W/4)
come out. The number of images is free. Height and width are those of the file: smaller images stand in the padding, where
`pixel_mask` is 0.

Shape letters: B images, Q queries, K classes, H W rows and columns of the padded input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor

INPUTS = ("pixel_values", "pixel_mask")
OUTPUTS = ("class_queries_logits", "masks_queries_logits")
OPSET = 18  # GridSample is in every runtime of it


class _PlainOutputs(nn.Module):
    def __init__(self, model: SIMForInstanceSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values, pixel_mask)
        return tuple(outputs[name] for name in OUTPUTS)


def input_size(image_processor: SIMImageProcessor) -> tuple[int, int]:
    """The (height, width) into which every image fits that this processor resizes."""
    size = image_processor.size
    lengths = (size.height, size.width) if size.height and size.width else (size.longest_edge, size.longest_edge)
    if not all(lengths):
        raise ValueError(f"the processor's size {dict(size)} has no limit, so give the height and width of the ONNX model")
    divisor = image_processor.size_divisor
    return -(-lengths[0] // divisor) * divisor, -(-lengths[1] // divisor) * divisor


def export_program(model: SIMForInstanceSegmentation, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The network on inputs of `size` (height, width), both multiples of 32, as torch.export's program."""
    height, width = size
    if height % 32 or width % 32 or min(size) < 32:
        raise ValueError(f"height and width must be multiples of 32, got {height} x {width}")
    plain = _PlainOutputs(model).eval()
    device = next(model.parameters()).device
    # Two images, the second with padding: one would be taken for a constant number, and no padding for none ever.
    pixel_mask = torch.ones(2, height, width, dtype=torch.int64, device=device)
    pixel_mask[1, height // 2 :] = 0
    batch = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        return torch.export.export(
            plain,
            (torch.zeros(2, 3, height, width, device=device), pixel_mask),
            dynamic_shapes=dict.fromkeys(INPUTS, batch),
            strict=False,
        )


def export_onnx(model: SIMForInstanceSegmentation, path: str | Path, size: tuple[int, int]) -> None:
    """Write the network as one .onnx file. size: (height, width) of its inputs (see `input_size`). Needs the extra `onnx`."""
    was_training = model.training
    try:
        exported = torch.onnx.export(
            export_program(model, size),
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
