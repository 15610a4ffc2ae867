"""What padding means on each grid of the network: which cells are image, where they are, and what masks are there.

Shape letters: B images, C channels, Q queries, H and W rows and columns of the input or of a feature map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# sigmoid(-30) is 1e-13: no mask in the padding, and sums over it stay finite in float16.
PADDING_LOGIT = -30.0
_TEMPERATURE = 10000.0
_EPSILON = 1e-6


def downsample_valid(valid_BHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells of a coarser grid that are image -> (B, h, w) bool.

    Nearest sampling reads each cell's first pixel, so with padding at the bottom and the right a cell counts as soon as
    it holds one image pixel.
    """
    (height, width), (rows, columns) = valid_BHW.shape[1:], size
    if height % rows == 0 and width % columns == 0:
        return valid_BHW[:, :: height // rows, :: width // columns] != 0
    return nn.functional.interpolate(valid_BHW[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5


def sine_position_embedding(
    valid_BHW: Tensor | None, size: tuple[int, int], num_channels: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """DETR's sine embedding of where a cell lies inside the image -> (B or 1, num_channels, h, w).

    Positions are fractions of the image without its padding, so they do not depend on what it was batched with. Equal
    to Mask2FormerSinePositionEmbedding when everything is image; computed in float32 for any `dtype`.
    """
    if valid_BHW is None:
        valid_BHW = torch.ones(1, *size, device=device)
    present_BHW = valid_BHW.float()
    y_BHW, x_BHW = present_BHW.cumsum(1), present_BHW.cumsum(2)
    y_BHW = y_BHW / (y_BHW[:, -1:, :] + _EPSILON) * (2 * math.pi)
    x_BHW = x_BHW / (x_BHW[:, :, -1:] + _EPSILON) * (2 * math.pi)

    half = num_channels // 2
    return torch.cat((sine_waves(y_BHW, half), sine_waves(x_BHW, half)), dim=3).permute(0, 3, 1, 2).to(dtype)


def sine_waves(angle: Tensor, num_channels: int) -> Tensor:
    """Sines and cosines in turn of angles (any shape), over geometric wavelengths -> (..., num_channels)."""
    channels = torch.arange(num_channels, device=angle.device)
    wavelengths = _TEMPERATURE ** (2 * torch.div(channels, 2, rounding_mode="floor").float() / num_channels)
    # A cosine is a sine a quarter of a turn on: no interleaving of two tensors, which takes longer than the functions.
    return (angle[..., None] / wavelengths).add_(channels % 2 * (math.pi / 2)).sin_()


def clear_padding(mask_logits_BQHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Mask logits with no mask in the padding -> (B, Q, h, w); in their place when nothing will be differentiated (an exported
    network does not know that)."""
    valid_BhW = downsample_valid(valid_BHW, (mask_logits_BQHW.shape[2], mask_logits_BQHW.shape[3]))
    keep = mask_logits_BQHW.requires_grad or torch.compiler.is_exporting()
    fill = mask_logits_BQHW.masked_fill if keep else mask_logits_BQHW.masked_fill_
    return fill(~valid_BhW[:, None], PADDING_LOGIT)
