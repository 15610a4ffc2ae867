"""sRGB to CIE Lab (D65, 2 degree observer), in torch, so that colour similarity needs no trip through NumPy.

Shape letters: B images, H and W rows and columns. Constants are those of scikit-image's `rgb2lab`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.losses.precision import autocast_disabled

# Rows X, Y, Z from linear red, green, blue (sRGB primaries, D65).
XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
D65_WHITE = (0.95047, 1.0, 1.08883)

SRGB_LINEAR_LIMIT = 0.04045  # below, the sRGB curve is a straight line
LAB_LINEAR_LIMIT = 0.008856  # (6/29)^3: below, the cube root of Lab is replaced by its tangent


@torch.no_grad()
def rgb_to_lab(images_B3HW: Tensor) -> Tensor:
    """sRGB in 0..1 -> L in 0..100, a and b in about -110..110, float32 (B, 3, H, W).

    Values outside 0..1 (rounding of a de-normalised image) are clamped.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images_B3HW.shape)}")
    rgb_B3HW = images_B3HW.float().clamp(0, 1)
    linear_B3HW = torch.where(rgb_B3HW > SRGB_LINEAR_LIMIT, ((rgb_B3HW + 0.055) / 1.055).pow(2.4), rgb_B3HW / 12.92)
    white_3 = rgb_B3HW.new_tensor(D65_WHITE)
    relative_xyz_from_rgb_33 = rgb_B3HW.new_tensor(XYZ_FROM_RGB) / white_3[:, None]
    with autocast_disabled(rgb_B3HW):
        xyz_B3HW = torch.einsum("dc,bchw->bdhw", relative_xyz_from_rgb_33, linear_B3HW)
    root_B3HW = torch.where(
        xyz_B3HW > LAB_LINEAR_LIMIT, xyz_B3HW.clamp(min=LAB_LINEAR_LIMIT).pow(1 / 3), 7.787 * xyz_B3HW + 16 / 116
    )
    x_BHW, y_BHW, z_BHW = root_B3HW.unbind(1)
    return torch.stack([116 * y_BHW - 16, 500 * (x_BHW - y_BHW), 200 * (y_BHW - z_BHW)], dim=1)
