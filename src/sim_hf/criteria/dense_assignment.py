"""Which locations of a feature pyramid learn which instance: FCOS's centre sampling (arXiv 1904.01355; 2006.09214).

A location is positive for an instance when it lies in the box and within `radius` strides of its centre on both axes, and the
largest of its distances to the four sides is in the range of its level. Where it is positive for several, the smallest box has
it. Within a radius of 1.5 strides a level has at most 3x3 locations, so only these are looked at: the work is proportional to
the instances, not to instances times locations.

Shape letters: G instances, L levels, O offsets on an axis, C candidates (instance, level, row, column), N positives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim_hf.structures import InstanceTargets

STRIDES = (8, 16, 32, 64, 128)
RADIUS = 1.5  # strides


@dataclass(frozen=True)
class DenseAssignment:
    """The positives, instance by instance: image_ids_N; locations_N: rows of the dense predictions (level by level, row by
    row); instance_ids_N ascending; distances_N4: left, top, right, bottom in input pixels; centers_N2: x and y."""

    image_ids_N: Tensor
    locations_N: Tensor
    instance_ids_N: Tensor
    distances_N4: Tensor
    centers_N2: Tensor

    def __len__(self) -> int:
        return len(self.locations_N)

    def centerness(self) -> Tensor:
        """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) -> (N,)"""
        near_N2 = torch.minimum(self.distances_N4[:, :2], self.distances_N4[:, 2:])
        far_N2 = torch.maximum(self.distances_N4[:, :2], self.distances_N4[:, 2:])
        return (near_N2 / far_N2).prod(-1).sqrt()

    def select(self, index: Tensor) -> DenseAssignment:
        """The positives at `index` (integers in ascending order or a boolean mask)."""
        return DenseAssignment(
            self.image_ids_N[index],
            self.locations_N[index],
            self.instance_ids_N[index],
            self.distances_N4[index],
            self.centers_N2[index],
        )


def grid_sizes(input_size: tuple[int, int], strides: Sequence[int] = STRIDES) -> list[tuple[int, int]]:
    """(rows, columns) of each level of the pyramid."""
    return [(-(-input_size[0] // stride), -(-input_size[1] // stride)) for stride in strides]


@torch.no_grad()
def assign_locations(
    targets: InstanceTargets,
    *,
    sizes_of_interest: Sequence[float],
    strides: Sequence[int] = STRIDES,
    radius: float = RADIUS,
) -> DenseAssignment:
    """sizes_of_interest: upper ends of the ranges of all levels but the last, which takes the rest; input pixels."""
    device = targets.boxes_G4.device
    grids = grid_sizes(targets.input_size, strides)
    stride_L = torch.tensor(strides, device=device)
    rows_L, columns_L = torch.tensor(grids, device=device).unbind(1)
    first_L = torch.tensor([0, *(rows * columns for rows, columns in grids)], device=device).cumsum(0)[:-1]
    low_L = torch.tensor([0.0, *sizes_of_interest], device=device)
    high_L = torch.tensor([*sizes_of_interest, math.inf], device=device)
    boxes_G114 = targets.boxes_G4[:, None, None].float()
    offsets_O = torch.arange(math.ceil(2 * radius), device=device)

    def candidates(low_G1: Tensor, high_G1: Tensor, length_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of an axis near the centre of each box: their index, their centre (G, L, O), and whether they count."""
        middle_G1 = (low_G1 + high_G1) / 2
        index_GLO = (middle_G1 / stride_L - radius - 0.5).floor().long()[..., None] + 1 + offsets_O
        centre_GLO = (index_GLO + 0.5) * stride_L[:, None]
        near_GLO = (centre_GLO - middle_G1[..., None]).abs() < radius * stride_L[:, None]
        return index_GLO, centre_GLO, near_GLO & (index_GLO >= 0) & (index_GLO < length_L[:, None])

    x1, y1, x2, y2 = boxes_G114[:, 0].unbind(-1)
    column_GLO, x_GLO, x_counts_GLO = candidates(x1, x2, columns_L)
    row_GLO, y_GLO, y_counts_GLO = candidates(y1, y2, rows_L)
    shape = (*row_GLO.shape, len(offsets_O))
    centers = torch.stack([x_GLO[:, :, None, :].expand(shape), y_GLO[..., None].expand(shape)], -1)
    boxes = boxes_G114[:, :, None]
    distances = torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], -1)
    largest = distances.amax(-1)
    in_range = (largest >= low_L[:, None, None]) & (largest <= high_L[:, None, None])
    counts = y_counts_GLO[..., None] & x_counts_GLO[:, :, None, :] & in_range & (distances.amin(-1) > 0)
    locations = first_L[:, None, None] + row_GLO[..., None] * columns_L[:, None, None] + column_GLO[:, :, None, :]
    instances_C = counts.nonzero()[:, 0]
    found = DenseAssignment(targets.image_ids_G[instances_C], locations[counts], instances_C, distances[counts], centers[counts])
    num_locations = sum(rows * columns for rows, columns in grids)
    return found.select(_of_the_smallest_box(found, targets.boxes_G4, num_locations))


def _of_the_smallest_box(found: DenseAssignment, boxes_G4: Tensor, num_locations: int) -> Tensor:
    """One candidate for each location, that of the smallest box (of equal ones the first) -> index, ascending"""
    area_G = (boxes_G4[:, 2:] - boxes_G4[:, :2]).prod(-1)
    by_area = area_G[found.instance_ids_N].argsort(stable=True)
    place_N = found.image_ids_N * num_locations + found.locations_N
    by_place = by_area[place_N[by_area].argsort(stable=True)]
    sorted_N = place_N[by_place]
    is_first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return by_place[is_first_N].sort().values


def positives_kept(instance_ids_N: Tensor, targets: InstanceTargets, budget: int) -> Tensor:
    """How many positives of each instance the mask losses take, when `budget` of an image are shared evenly by its instances that
    have any, at least one each. -> (G,) int64"""
    available_G = instance_ids_N.bincount(minlength=len(targets))
    instances_B = targets.image_ids_G[available_G > 0].bincount(minlength=targets.num_images)
    share_B = (budget // instances_B.clamp(min=1)).clamp(min=1)
    return torch.minimum(available_G, share_B[targets.image_ids_G])


def best_positives(instance_ids_N: Tensor, scores_N: Tensor, kept_G: Tensor) -> Tensor:
    """The `kept_G` best positives of each instance by score (of equal ones the first) -> index, ascending"""
    by_score = scores_N.argsort(descending=True, stable=True)
    order = by_score[instance_ids_N[by_score].argsort(stable=True)]
    sizes_G = instance_ids_N.bincount(minlength=len(kept_G))
    ids = instance_ids_N[order]
    rank = torch.arange(len(order), device=order.device) - (sizes_G.cumsum(0) - sizes_G)[ids]
    return order[rank < kept_G[ids]].sort().values
