"""CondInst's mask head (Sec. 3.3): every instance brings the weights of three 1x1 convolutions of its own.

The head reads the mask map F and the coordinates relative to its instance, (x_n - x) / s and (y_n - y) / s. They enter through
the first layer only, and there they are an affine term: w (x_n - x) / s = -(w / s) x + (w x_n / s). So the pixel's x and y are
two more channels that all instances share, and the instance's place belongs to its bias: no coordinate map per instance exists,
and the first layer of all instances of an image is one matrix product.

Shape letters: B images, N instances, C channels of the mask map, D hidden channels, P numbers of a controller, M cells of the
grid, H W its rows and columns.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

_CELLS_AT_A_TIME = 2**24  # of one hidden layer of all instances together


def num_parameters(mask_channels: int, hidden_channels: int) -> int:
    """How many numbers a controller predicts: 169 for 8 and 8."""
    return (mask_channels + 2) * hidden_channels + hidden_channels**2 + hidden_channels + 2 * hidden_channels + 1


def hidden_channels(num_controls: int, mask_channels: int) -> int:
    """The inverse of `num_parameters`."""
    channels = next(d for d in count(1) if num_parameters(mask_channels, d) >= num_controls)
    if num_parameters(mask_channels, channels) != num_controls:
        raise ValueError(f"no mask head on {mask_channels} channels has {num_controls} numbers")
    return channels


def split_parameters(controllers_NP: Tensor, mask_channels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (N, D, C + 2), (N, D, D), (N, 1, D) and biases (N, D), (N, D), (N, 1), in the order of public checkpoints: all
    weights, then all biases; of the first layer's inputs the two coordinates (x, y) come first."""
    hidden = hidden_channels(controllers_NP.shape[-1], mask_channels)
    channels = [mask_channels + 2, hidden, hidden, 1]
    shapes = list(zip(channels[1:], channels[:-1], strict=True))
    sizes = [rows * columns for rows, columns in shapes] + channels[1:]
    parts = controllers_NP.split(sizes, dim=-1)
    weights = [part.unflatten(-1, shape) for part, shape in zip(parts[:3], shapes, strict=True)]
    return weights, list(parts[3:])


def dynamic_masks(
    mask_maps_BCHW: Tensor,
    controllers_NP: Tensor,
    image_ids_N: Tensor,
    locations_N2: Tensor,
    scales_N: Tensor,
    *,
    stride: int,
) -> Tensor:
    """Mask logits on the grid of the mask map, in float32: coordinates of hundreds of pixels cancel each other. -> (N, H, W)

    image_ids_N: ascending. locations_N2: (x, y) of each instance in input pixels; scales_N: s, in pixels.
    """
    with torch.autocast(mask_maps_BCHW.device.type, enabled=False):
        arguments = (mask_maps_BCHW.float(), controllers_NP.float(), image_ids_N, locations_N2.float(), scales_N.float())
        return _dynamic_masks(*arguments, stride)


def _dynamic_masks(
    mask_maps_BCHW: Tensor, controllers_NP: Tensor, image_ids_N: Tensor, locations_N2: Tensor, scales_N: Tensor, stride: int
) -> Tensor:
    _, channels, height, width = mask_maps_BCHW.shape
    maps_BCM = _with_coordinates(mask_maps_BCHW, stride)
    (first_NDC, *weights), (first_bias_ND, *biases) = split_parameters(controllers_NP, channels)
    hidden = first_NDC.shape[1]
    coordinates_ND2 = first_NDC[:, :, :2] / scales_N[:, None, None]
    first_NDC = torch.cat([first_NDC[:, :, 2:], -coordinates_ND2], 2)
    first_bias_ND = torch.baddbmm(first_bias_ND[:, :, None], coordinates_ND2, locations_N2[:, :, None])[:, :, 0]
    counts = torch.bincount(image_ids_N, minlength=len(maps_BCM)).tolist()
    most = max(_CELLS_AT_A_TIME // (hidden * height * width), 1)
    masks, start = [], 0
    for map_CM, num_rows in zip(maps_BCM, counts, strict=True):
        for begin in range(start, start + num_rows, most):
            rows = slice(begin, min(begin + most, start + num_rows))
            bias_R1 = first_bias_ND[rows].flatten()[:, None]
            hidden_RM = torch.addmm(bias_R1, first_NDC[rows].flatten(0, 1), map_CM).relu_()
            hidden_NDM = hidden_RM.unflatten(0, (-1, hidden))
            hidden_NDM = torch.baddbmm(biases[0][rows, :, None], weights[0][rows], hidden_NDM).relu_()
            masks.append(torch.baddbmm(biases[1][rows, :, None], weights[1][rows], hidden_NDM))
        start += num_rows
    if not masks:  # an empty product of the same tensors: a gradient of 0 reaches all of them
        nothing = controllers_NP.sum() + mask_maps_BCHW[:0].sum()
        return nothing * mask_maps_BCHW.new_zeros(0, height, width)
    return torch.cat(masks).view(-1, height, width)


def _with_coordinates(mask_maps_BCHW: Tensor, stride: int) -> Tensor:
    """The mask map with the x and y of each cell's centre (input pixels) as two more channels -> (B, C + 2, M)"""
    batch_size, _, height, width = mask_maps_BCHW.shape
    x_W = (torch.arange(width, device=mask_maps_BCHW.device, dtype=mask_maps_BCHW.dtype) + 0.5) * stride
    y_H = (torch.arange(height, device=mask_maps_BCHW.device, dtype=mask_maps_BCHW.dtype) + 0.5) * stride
    xy_2HW = torch.stack([x_W.expand(height, width), y_H[:, None].expand(height, width)])
    return torch.cat([mask_maps_BCHW, xy_2HW.expand(batch_size, -1, -1, -1)], 1).flatten(2)
