"""What keeps every loss in float32: half-precision networks hand over half-precision logits, and autocast would send
the matrix products of a cost back to half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 stays float64 (gradient checks), bool and integers become float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_disabled(tensor: Tensor) -> torch.autocast:
    """A context in which products on the tensor's device keep the dtype of their operands."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
