"""The cells inside the boxes of a batch as one list: boxes are small, so pseudo masks are made there and nowhere else.

Shape letters: G instances, R rows of boxes (instance by instance), V cells inside the boxes (instance by instance, in
reading order), P maps, H W mask grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim_hf.structures import rasterize_boxes


@dataclass(frozen=True)
class BoxCells:
    """instances_V: row of the box. cells_V: flat index (row * W + column) on the grid. grid_size: (H, W)."""

    instances_V: Tensor
    cells_V: Tensor
    num_instances: int
    grid_size: tuple[int, int]

    def pick(self, maps_PHW: Tensor, map_of_instance_G: Tensor | None = None) -> Tensor:
        """What every cell finds in its instance's map; map g is that of instance g unless told otherwise. -> (V,)"""
        return maps_PHW.reshape(-1).index_select(0, self._places(map_of_instance_G))

    def pick_each(self, maps_PHW: Tensor, map_of_instance_XG: Tensor) -> Tensor:
        """`pick` for each of X choices of the instances' maps. -> (X, V)"""
        height, width = self.grid_size
        places_XV = map_of_instance_XG.index_select(1, self.instances_V).mul_(height * width).add_(self.cells_V)
        return maps_PHW.reshape(-1).index_select(0, places_XV.flatten()).view(places_XV.shape)

    def paint(self, values_V: Tensor, maps_GHW: Tensor) -> None:
        """The inverse of `pick`: put the values into the instances' maps (contiguous, changed in place)."""
        maps_GHW.view(-1).scatter_(0, self._places(None), values_V)

    def spread(self, values_G: Tensor) -> Tensor:
        """An instance's value for each of its cells. -> (V,)"""
        return values_G.index_select(0, self.instances_V)

    def total(self, values_V: Tensor) -> Tensor:
        """Sum over the cells of an instance, float64 or int64: the same in any order. -> (G,)"""
        values_V = values_V.to(torch.float64 if values_V.is_floating_point() else torch.int64)
        return values_V.new_zeros(self.num_instances).index_add_(0, self.instances_V, values_V)

    def _places(self, map_of_instance_G: Tensor | None) -> Tensor:
        height, width = self.grid_size
        maps_V = self.instances_V if map_of_instance_G is None else self.spread(map_of_instance_G)
        return (maps_V * (height * width)).add_(self.cells_V)


def box_cells(boxes_G4: Tensor, height: int, width: int, stride: float) -> BoxCells:
    """The cells of `box_masks`, without making the masks."""
    rows_GH, columns_GW = rasterize_boxes(boxes_G4, height, width, stride)
    instances_R, rows_R = rows_GH.nonzero(as_tuple=True)
    length_R = columns_GW.sum(1)[instances_R]
    first_R = rows_R * width + columns_GW.to(torch.uint8).argmax(1)[instances_R]
    # Cell v of the list is cell v - start of its row, which begins at `first` on the grid.
    shift_R = first_R - (length_R.cumsum(0) - length_R)
    rows_V = torch.repeat_interleave(length_R)
    cells_V = torch.arange(len(rows_V), device=rows_V.device).add_(shift_R.index_select(0, rows_V))
    return BoxCells(instances_R.index_select(0, rows_V), cells_V, len(boxes_G4), (height, width))
