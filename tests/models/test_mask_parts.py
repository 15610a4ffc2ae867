"""What of a mask is one object: grids drawn by hand, and a slow search over all rows and columns."""

import math

import pytest
import torch

from sim_hf.models.sim.mask_parts import main_parts


def logits(*rows: str) -> torch.Tensor:
    return torch.tensor([[2.0 if cell == "#" else -1.0 for cell in row] for row in rows])


def whole(mask: torch.Tensor):
    rows, columns = (torch.nonzero(mask.any(axis)).flatten().tolist() for axis in (1, 0))
    return (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)


def kept(grid: torch.Tensor, gap: float) -> tuple[torch.Tensor, tuple]:
    (result,), (span,) = main_parts(grid[None], [whole(grid > 0)], 0.0, gap)
    assert torch.equal(result > 0, (result > 0) & (grid > 0)) and whole(result > 0) == span
    return result, span


def test_a_bit_far_away_goes_and_what_is_left_keeps_its_logits():
    grid = logits("##......", "##......", "##.....#")
    result, span = kept(grid, 0.25)  # the area is 7, so more than 0.66 empty columns part it: there are five
    assert span == ((0, 3), (0, 2)) and torch.equal(result[:, :2], grid[:, :2])
    assert result[2, 7] == 0 and torch.equal(result[:, 2:7], grid[:, 2:7])  # at the cut, not above it


def test_parts_that_lie_close_together_stay():
    grid = logits("####..##", "####..##")  # 12 cells: up to 0.6 * 3.46 = 2.08 empty columns
    assert kept(grid, 0.6)[1] == ((0, 2), (0, 8))
    assert kept(grid, 0.5)[1] == ((0, 2), (0, 4))


def test_the_largest_part_stays_though_another_is_longer():
    assert kept(logits("##......", "##......", "##......", "........", "..#####."), 0.0)[1] == ((0, 3), (0, 2))


def test_what_is_left_is_looked_at_again():
    """At first only columns part it; without the left part, the first row is empty."""
    grid = logits("#.......", "#.....##", "......##", "......##")
    assert kept(grid, 0.0)[1] == ((1, 4), (6, 8))
    grid = logits("##....#.", "##......", "........", "........", "......#.")
    assert kept(grid, 0.5)[1] == ((0, 2), (0, 2))


def test_one_cell_and_whole_masks_stay_and_empty_ones_are_none():
    one, full, empty = torch.full((3, 4, 4), -1.0)
    one[2, 3], full[:] = 1.0, 1.0
    grids = torch.stack([one, full, empty])
    result, spans = main_parts(grids, [((2, 3), (3, 4)), ((0, 4), (0, 4)), None], 0.0, 0.0)
    assert result is grids and spans == [((2, 3), (3, 4)), ((0, 4), (0, 4)), None]
    assert main_parts(grids[:0], [], 0.0, 0.25)[1] == []


@pytest.mark.parametrize("seed", range(30))
def test_against_a_search_over_all_bands(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 11, generator=generator) < 0.12
    mask[4, 5] = True
    gap = [0.0, 0.3, 0.7][seed % 3]
    result, _ = kept(torch.where(mask, 1.0, -1.0), gap)
    assert torch.equal(result > 0, slow_main_part(mask, gap))


def slow_main_part(mask: torch.Tensor, gap: float) -> torch.Tensor:
    while True:
        before, reach = mask, gap * math.sqrt(mask.sum())
        for axis in (0, 1):
            cells = mask.sum(1 - axis).tolist()
            runs, empty = [[]], math.inf
            for place, count in enumerate(cells):
                if not count:
                    empty += 1
                    continue
                if runs[-1] and empty > reach:
                    runs.append([])
                runs[-1].append(place)
                empty = 0
            best = max(runs, key=lambda run: sum(cells[place] for place in run))
            inside = torch.zeros(mask.shape[axis], dtype=torch.bool)
            inside[best] = True
            mask = mask & (inside[:, None] if axis == 0 else inside)
        if torch.equal(mask, before):
            return mask
