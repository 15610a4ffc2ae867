"""What an object of few cells looks like: the ellipse in its box (not in the paper).

On photographs and under the microscope alike, the ellipse is nearer to the real masks of small objects than the filled box, and
up to `FEW_CELLS` nearer than the masks of a trained network (docs/measurements.md). So pseudo masks lean on it: wholly up to
`FEW_CELLS`, and less and less up to `MANY_CELLS`.

Shape letters: G instances, V cells inside their boxes (instance by instance).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.mask_generation.box_cells import BoxCells
from sim_hf.structures import PseudoMasks, box_masks

FEW_CELLS, MANY_CELLS = 3.0, 6.0


def smallness(boxes_G4: Tensor, stride: float) -> Tensor:
    """1 for boxes (xyxy, input pixels) of up to `FEW_CELLS` a side, sqrt(width * height), 0 from `MANY_CELLS` on. -> (G,)"""
    side_G = (boxes_G4[:, 2:] - boxes_G4[:, :2]).clamp(min=0).prod(-1).sqrt() / stride
    return ((MANY_CELLS - side_G) / (MANY_CELLS - FEW_CELLS)).clamp(0, 1)


def mark_small_objects(masks: PseudoMasks, boxes_G4: Tensor, stride: float) -> None:
    """Write `smallness` into masks that are background everywhere (`masks_outside_of_boxes`). What small objects trust of it is
    a rim of two cells around their box: the mean over the whole picture would say nothing about a few cells. Where their box
    covers a part of a cell nothing is trusted; cells whose middle lies inside are painted over."""
    masks.smallness_G.copy_(smallness(boxes_G4, stride))
    height, width = masks.trusted_GHW.shape[1:]
    outwards = boxes_G4.new_tensor([-stride, -stride, stride, stride])
    # The cells that a box touches are those whose middle lies in the box grown by half a cell; by 1 % is not touched.
    touched_GHW = box_masks(boxes_G4 + 0.49 * outwards, height, width, stride)
    rim_GHW = box_masks(boxes_G4 + 2 * outwards, height, width, stride) & ~touched_GHW
    masks.trusted_GHW &= rim_GHW | (masks.smallness_G == 0)[:, None, None]


def ellipse_shares(boxes_G4: Tensor, cells: BoxCells, stride: float) -> Tensor:
    """Share of each cell that the ellipse in its instance's box covers, its edge taken as straight within a cell. -> (V,) in 0..1

    Examples:
        >>> from sim_hf.mask_generation.box_cells import box_cells
        >>> boxes = torch.tensor([[0.0, 0.0, 12.0, 12.0]])
        >>> ellipse_shares(boxes, box_cells(boxes, 3, 3, 4.0), 4.0).view(3, 3).double().round(decimals=2).tolist()
        [[0.59, 1.0, 0.59], [1.0, 1.0, 1.0], [0.59, 1.0, 0.59]]
    """
    columns = cells.grid_size[1]
    half_G2 = ((boxes_G4[:, 2:] - boxes_G4[:, :2]) / (2 * stride)).clamp(min=0.5)  # at least a cell: there is always a middle
    middle_G2 = (boxes_G4[:, :2] + boxes_G4[:, 2:]) / (2 * stride)
    half_V2 = half_G2.index_select(0, cells.instances_V)
    place_V2 = torch.stack([cells.cells_V % columns, cells.cells_V // columns], -1) + 0.5
    offset_V2 = place_V2 - middle_G2.index_select(0, cells.instances_V)
    # Distance to the edge, in cells, to first order: F / |grad F| of F = (x / a)^2 + (y / b)^2 - 1.
    excess_V = (offset_V2 / half_V2).square().sum(-1) - 1
    slope_V = 2 * torch.linalg.vector_norm(offset_V2 / half_V2.square(), dim=-1)
    return (0.5 - excess_V / slope_V.clamp(min=1e-6)).clamp(0, 1)
