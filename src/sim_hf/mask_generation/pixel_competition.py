"""Pixel competition: a pixel shows one instance, so instances whose boxes overlap share it by how well they explain it.

Not in the paper. There, a pixel in two boxes of one class is foreground of both (the semantic map cannot tell them apart, and a
teacher that has merged two neighbours says so for both), and pseudo masks of touching objects grow together. Here an instance
keeps a pixel in proportion to its score against its strongest rival's, score = M_I * centrality: where the masks say the same,
the box that holds the pixel nearer to its centre wins.

Shape letters: G instances, V cells inside their boxes (instance by instance), X cells of the grids of all images, H W mask grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim_hf.mask_generation.box_cells import BoxCells

RADIUS = 1.25  # half sides of the box at which centrality has faded to 0; its corners lie at 1.41


def centrality(offsets_x: Tensor, offsets_y: Tensor, radius: float = RADIUS) -> Tensor:
    """1 around the middle of a box, falling to 0 at `radius`; offsets from the middle in half sides, of shapes that broadcast."""
    return (radius - torch.hypot(offsets_x, offsets_y)).clamp(0, 1)


def pixel_share(score: Tensor, rival: Tensor) -> Tensor:
    """The part of a pixel that an instance keeps: all of it down to a tie with its strongest rival, then in proportion
    (2 s / (s + r)); all of it where there is no rival (r = 0). Equal shapes -> the same shape, 0..1."""
    tiny = torch.finfo(score.dtype).tiny
    return torch.where(rival > 0, 2 * score / (score + rival).clamp(min=tiny), 1.0).clamp(max=1.0)


class PixelCompetition:
    """The two best scores at every cell of every image, from instances that enter some at a time."""

    def __init__(self, num_images: int, grid_size: tuple[int, int], stride: float, device: torch.device) -> None:
        self.grid_size = grid_size
        self.stride = stride
        self.best_X = torch.zeros(num_images * grid_size[0] * grid_size[1], device=device)
        self.second_X = torch.zeros_like(self.best_X)

    @torch.no_grad()
    def enter(self, cells: BoxCells, instance_V: Tensor, boxes_G4: Tensor, image_ids_G: Tensor) -> None:
        """These instances compete, with M_I at the cells of their boxes; each instance of the batch once."""
        score_V, place_V = self._scores(cells, instance_V, boxes_G4, image_ids_G)
        best_X, second_X = torch.zeros_like(self.best_X), torch.zeros_like(self.best_X)
        best_X.scatter_reduce_(0, place_V, score_V, "amax")
        beaten_V = torch.where(score_V == best_X.index_select(0, place_V), 0.0, score_V)
        second_X.scatter_reduce_(0, place_V, beaten_V, "amax")
        # The two best of two pairs.
        loser_X = torch.minimum(self.best_X, best_X)
        self.second_X = torch.maximum(torch.maximum(self.second_X, second_X), loser_X)
        self.best_X = torch.maximum(self.best_X, best_X)

    @torch.no_grad()
    def shares(self, cells: BoxCells, instance_V: Tensor, boxes_G4: Tensor, image_ids_G: Tensor) -> Tensor:
        """What each of these instances keeps of the cells of its box, when all have entered -> (V,), 1 where it is alone."""
        score_V, place_V = self._scores(cells, instance_V, boxes_G4, image_ids_G)
        best_V, second_V = self.best_X.index_select(0, place_V), self.second_X.index_select(0, place_V)
        return pixel_share(score_V, torch.where(score_V == best_V, second_V, best_V))

    def claimed(self, cells: BoxCells, image_ids_G: Tensor, threshold: float) -> Tensor:
        """Where any instance of the image has a score above `threshold`, when all have entered -> (V,) bool"""
        return self.best_X.index_select(0, self._places(cells, image_ids_G)) > threshold

    def _scores(self, cells: BoxCells, instance_V: Tensor, boxes_G4: Tensor, image_ids_G: Tensor) -> tuple[Tensor, Tensor]:
        """M_I * centrality, and the place of every cell in the grids of all images."""
        score_V = instance_V * _centrality_of_cells(cells, boxes_G4, self.stride)
        return score_V.nan_to_num_(0.0), self._places(cells, image_ids_G)

    def _places(self, cells: BoxCells, image_ids_G: Tensor) -> Tensor:
        height, width = self.grid_size
        return (cells.spread(image_ids_G) * (height * width)).add_(cells.cells_V)


def _centrality_of_cells(cells: BoxCells, boxes_G4: Tensor, stride: float) -> Tensor:
    _, width = cells.grid_size
    rows_V = torch.div(cells.cells_V, width, rounding_mode="floor")
    columns_V = cells.cells_V - rows_V * width
    x1_V, y1_V, x2_V, y2_V = (cells.spread(side_G) for side_G in boxes_G4.float().unbind(-1))

    def offsets(places_V: Tensor, low_V: Tensor, high_V: Tensor) -> Tensor:
        return (2 * (places_V + 0.5) * stride - low_V - high_V) / (high_V - low_V).clamp(min=stride)

    return centrality(offsets(columns_V, x1_V, x2_V), offsets(rows_V, y1_V, y2_V))
