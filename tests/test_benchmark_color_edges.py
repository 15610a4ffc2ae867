"""How often neighbours of one colour are of one object: two objects drawn by hand, and the command on rendered shapes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from factories import write_shapes

PATH = Path(__file__).parents[1] / "benchmarks" / "color_edges.py"


@pytest.fixture(scope="module")
def color_edges():
    spec = importlib.util.spec_from_file_location("color_edges", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shares_of_two_objects_by_hand(color_edges):
    """In 2 x 3 cells, objects 1 and 2 and ground, downwards only: three pairs, one of them inside an object."""
    ids = torch.tensor([[1, 2, 0], [1, 0, 2]])
    similar = torch.zeros(4, 2, 3, dtype=torch.bool)
    assert color_edges.shares(similar, ids, 1) == (0, 0)
    down = color_edges.half_ring_offsets(3, 1).index((1, 0))
    similar[down, 0] = torch.tensor([True, True, False])
    across, inside = color_edges.shares(similar, ids, 1)
    # Downwards, sideways, to the lower right, to the lower left.
    pairs = [(1, 1), (2, 0), (0, 2), (1, 2), (2, 0), (1, 0), (0, 2), (1, 0), (2, 2), (2, 1), (0, 0)]
    num_across = sum(a != b for a, b in pairs)
    assert across == pytest.approx(1 / num_across) and inside == pytest.approx(1 / sum(a == b > 0 for a, b in pairs))


def test_of_overlapping_objects_a_cell_belongs_to_the_last(color_edges):
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4], masks[1, :4] = True, True
    masks[1, 4, 7] = True  # a sixteenth of a cell
    assert color_edges.instance_map(masks, 2, 2).tolist() == [[2, 2], [1, 0]]


def test_the_command_prints_a_row_for_every_setting(color_edges, tmp_path, monkeypatch, capsys):
    folder = write_shapes(tmp_path / "shapes")
    monkeypatch.setattr(
        sys, "argv", ["color_edges.py", str(folder), "--image_size", "64", "--min_contrast", "0", "90", "--limit", "2"]
    )
    color_edges.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| shapes (2)")]
    plain, stretched = ([float(cell) for cell in row.split("|")[4:6]] for row in rows)
    assert all(0 <= share <= 1 for share in plain) and all(a >= b for a, b in zip(plain, stretched, strict=True))
