"""The network as an ONNX file, for runtimes without PyTorch.

Everything that an image goes through between the image processor and the post-processing is in it: `pixel_values` (B, 3, H, W)
float32 and `pixel_mask` (B, H, W) int64 go in, `class_queries_logits` (B, Q, K + 1) and `masks_queries_logits` (B, Q, H/4, W/4)
come out, for any number of images, and any height and width that are multiples of 32 and at least 64, or one that is given:
backbones that cut their input into windows (Swin) or patches need that. Smaller images then stand in the padding, where
`pixel_mask` is 0.

Shape letters: B images, Q queries, K classes, H W rows and columns of the padded input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from sim_hf.models.architectures import ARCHITECTURES, InstanceSegmenter

INPUTS = ("pixel_values", "pixel_mask")
OUTPUTS = ("class_queries_logits", "masks_queries_logits")
OPSET = 18  # GridSample is in every runtime of it
_STRIDE = 32  # of the coarsest map
_OF_ONE_SIZE = ("swin", "swinv2", "dinov2", "dinov2_with_registers")  # what they do depends on what the input's size leaves over


class _PlainOutputs(nn.Module):
    def __init__(self, model: InstanceSegmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values, pixel_mask)
        return tuple(outputs[name] for name in OUTPUTS)


def export_program(model: InstanceSegmenter, size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """The network as torch.export's program, for any number of images. size: (height, width) of its inputs, None: any."""
    reason = ARCHITECTURES[model.config.model_type].not_exported
    if reason:
        raise ValueError(f"{type(model).__name__} cannot be exported: {reason}")
    height, width = size or (64, 96)
    if height % _STRIDE or width % _STRIDE:
        raise ValueError(f"height and width must be multiples of {_STRIDE}, got {height} x {width}")
    backbone = model.config.backbone_config.model_type  # pyright: ignore[reportOptionalMemberAccess]
    if size is None and backbone in _OF_ONE_SIZE:
        raise ValueError(f"a network with the backbone {backbone!r} is exported for one height and width: give the size")
    plain = _PlainOutputs(model).eval()
    device = next(model.parameters()).device
    # Two images, the second with padding; a single one, or a square, would be taken for what always comes.
    pixel_mask = torch.ones(2, height, width, dtype=torch.int64, device=device)
    pixel_mask[1, height // 2 :] = 0
    free = {0: Dim("batch", min=1, max=1024)}
    if size is None:
        free |= {2: _STRIDE * Dim("rows_of_32", min=2, max=256), 3: _STRIDE * Dim("columns_of_32", min=2, max=256)}
    shapes = {"pixel_values": free, "pixel_mask": {max(axis - 1, 0): length for axis, length in free.items()}}
    with torch.no_grad():
        return torch.export.export(
            plain, (torch.zeros(2, 3, height, width, device=device), pixel_mask), dynamic_shapes=shapes, strict=False
        )


def export_onnx(model: InstanceSegmenter, path: str | Path, size: tuple[int, int] | None = None) -> None:
    """Write the network as one .onnx file. size: see `export_program`. Needs the extra `onnx`."""
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
