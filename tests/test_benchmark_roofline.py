"""What the roofline counts, by hand."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def count(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import roofline

    return roofline.Count


def test_a_product_is_two_operations_a_term_and_each_matrix_once_through_memory(count):
    left, right = torch.zeros(4, 8), torch.zeros(8, 16)
    with count() as counted:
        left @ right
    assert (counted.flops, counted.bytes, counted.calls) == (2 * 4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16), 1)


def test_views_are_free_and_an_expanded_tensor_is_as_large_as_its_memory(count):
    row = torch.zeros(1, 8)
    with count() as counted:
        wide = row.expand(100, 8).t()
    assert counted.bytes == counted.calls == 0
    with count() as counted:
        wide + 1.0
    assert counted.bytes == 4 * (8 + 800)


def test_the_backward_counts_too(count):
    weight = torch.zeros(8, 16, requires_grad=True)
    with count() as counted:
        (torch.zeros(4, 8) @ weight).sum().backward()
    assert counted.flops == 2 * (2 * 4 * 8 * 16)
