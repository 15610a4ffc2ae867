"""The functions that replace stock ones, against those."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderOnly,
    Mask2FormerSinePositionEmbedding,
)
from transformers.models.mask2former.modeling_mask2former import (
    multi_scale_deformable_attention as stock_deformable_attention,
)

from sim_hf.models.sim import masked_attention
from sim_hf.models.sim.deformable_attention import (
    _bag_products,
    _row_products,
    _softmax,
    multi_scale_deformable_attention,
)
from sim_hf.models.sim.masked_attention import MaskedCrossAttention
from sim_hf.models.sim.padding import PADDING_LOGIT, clear_padding, downsample_valid, sine_position_embedding
from sim_hf.models.sim.pixel_decoder import _cell_centres


def test_deformable_attention_equals_the_stock_one_with_its_gradients():
    shapes = [(3, 5), (6, 9), (11, 18)]
    cells = sum(height * width for height, width in shapes)
    value = torch.randn(2, cells, 4, 8, requires_grad=True)
    locations = (torch.rand(2, 10, 4, 3, 4, 2) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(2, 10, 4, 3, 4, requires_grad=True)
    ours = multi_scale_deformable_attention(value, shapes, locations, weights)
    stock = stock_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (value, locations, weights), direction),
        torch.autograd.grad(stock, (value, locations, weights), direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


def test_deformable_attention_and_its_gradients_equal_the_stock_ones_far_outside_and_on_one_cell():
    shapes = [(1, 1), (1, 4), (5, 2)]
    value = torch.randn(2, 15, 3, 4, dtype=torch.float32, requires_grad=True)
    locations = (torch.rand(2, 40, 3, 3, 2, 2) * 5 - 2).requires_grad_()
    weights = torch.randn(2, 40, 3, 3, 2, requires_grad=True)
    results = []
    for attention in (multi_scale_deformable_attention, stock_deformable_attention):
        result = attention(value, shapes, locations, weights)
        results.append((result, *torch.autograd.grad(result.square().sum(), (value, locations, weights))))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_products_of_rows_on_the_cpu_equal_embedding_bags_own():
    for num_rows in (11, 50):  # fewer and more rows than a sum has; one row may stand in a sum twice
        table, grad = torch.randn(num_rows, 6), torch.randn(7, 6)
        rows = torch.randint(0, num_rows, (7, 4, 5), dtype=torch.int32)
        expected = (table[rows.long()] * grad[:, None, None]).sum(-1)
        torch.testing.assert_close(_row_products(grad, table, rows), expected)
        torch.testing.assert_close(_bag_products(grad, table, rows), expected)


def test_deformable_attention_on_cell_centres_has_the_stock_gradient_of_the_location():
    # Where the initial offsets point to. The bilinear surface has a kink there, and both must take the same side.
    shapes = [(4, 4), (8, 8)]
    centres = (torch.arange(8) + 0.5) / 8
    locations = torch.cartesian_prod(centres, centres).view(1, 64, 1, 1, 1, 2).repeat(1, 1, 2, 2, 1, 1).requires_grad_()
    value, weights = torch.randn(1, 80, 2, 4), torch.rand(1, 64, 2, 2, 1)
    gradients = [
        torch.autograd.grad(attention(value, shapes, locations, weights).square().sum(), locations)[0]
        for attention in (multi_scale_deformable_attention, stock_deformable_attention)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_deformable_attention_reads_nothing_far_outside_and_says_nan_for_nan():
    value, weights = torch.ones(1, 4, 1, 2), torch.ones(1, 3, 1, 1, 1)
    locations = torch.tensor([1e30, -1e30, float("nan")]).view(1, 3, 1, 1, 1, 1).repeat(1, 1, 1, 1, 1, 2)
    result = multi_scale_deformable_attention(value, [(2, 2)], locations, weights)
    assert result[0, :2].eq(0).all() and result[0, 2].isnan().all()


def test_deformable_attention_keeps_a_half_precision_dtype():
    value = torch.randn(1, 4, 2, 4).bfloat16()
    result = multi_scale_deformable_attention(value, [(2, 2)], torch.rand(1, 3, 2, 1, 4, 2), torch.rand(1, 3, 2, 1, 4))
    assert result.dtype == torch.bfloat16 and result.shape == (1, 3, 8)


def test_cell_centres_equal_the_stock_reference_points_without_padding():
    shapes = [(2, 3), (4, 6)]
    stock = Mask2FormerPixelDecoderEncoderOnly.get_reference_points(shapes, torch.ones(1, 2, 2), "cpu")
    torch.testing.assert_close(_cell_centres(shapes, torch.device("cpu")).expand_as(stock), stock)


def test_position_embedding_equals_the_stock_one_without_and_with_padding():
    stock = Mask2FormerSinePositionEmbedding(num_position_features=8, normalize=True)
    valid = torch.zeros(2, 5, 7, dtype=torch.bool)
    valid[0, :3, :4], valid[1] = True, True
    keywords = {"device": torch.device("cpu"), "dtype": torch.float32}
    for mask in (None, valid):
        ours = sine_position_embedding(mask, (5, 7), 16, **keywords).expand(2, -1, -1, -1)
        theirs = stock(torch.Size((2, 16, 5, 7)), "cpu", torch.float32, mask)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    alone = sine_position_embedding(None, (3, 4), 16, **keywords)
    torch.testing.assert_close(sine_position_embedding(valid, (5, 7), 16, **keywords)[:1, :, :3, :4], alone)


@pytest.mark.parametrize(("rows", "cells"), [(32, 1), (33, 2), (63, 2), (64, 2), (1, 1)])
def test_a_cell_is_image_as_soon_as_it_holds_one_image_pixel(rows, cells):
    valid = torch.zeros(1, 96, 64, dtype=torch.bool)
    valid[:, :rows] = True
    assert downsample_valid(valid, (3, 2))[0, :, 0].sum() == cells


def test_padding_logits_are_safe_in_half_precision():
    logits = torch.zeros(1, 2, 8, 8, dtype=torch.float16)
    valid = torch.zeros(1, 32, 32, dtype=torch.bool)
    valid[:, :16] = True
    cleared = clear_padding(logits, valid)
    assert cleared.sum().isfinite() and cleared.sigmoid()[:, :, 4:].max() == 0 and (cleared[:, :, :4] == 0).all()


@pytest.mark.parametrize("num_points", [12, 16, 5])
def test_softmax_over_the_points_is_the_plain_one_with_its_gradient(num_points):
    logits = (3 * torch.randn(2, 5, 4, num_points)).requires_grad_()
    direction = torch.randn_like(logits)
    results = [(value, torch.autograd.grad(value, logits, direction)[0]) for value in (_softmax(logits), logits.softmax(-1))]
    torch.testing.assert_close(*results)


def test_cells_of_an_even_grid_are_those_of_nearest_sampling():
    valid = torch.rand(2, 96, 64) > 0.5
    for size in ((3, 2), (24, 16), (5, 7)):
        plain = nn.functional.interpolate(valid[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5
        assert downsample_valid(valid, size).equal(plain)


def test_clearing_the_padding_copies_logits_that_have_a_gradient_only():
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    logits = torch.ones(1, 1, 4, 4, requires_grad=True)
    cleared = clear_padding(logits, valid)
    assert (cleared == PADDING_LOGIT).all() and (logits == 1).all()
    plain = logits.detach().clone()
    assert clear_padding(plain, valid) is plain and plain.equal(cleared)


@pytest.mark.parametrize("autocast", [True, False])
def test_attention_in_bfloat16_is_as_near_to_float32_as_the_fused_one(autocast):
    ours = MaskedCrossAttention(32, 4)
    query, key, value = (torch.randn(length, 2, 32).bfloat16() for length in (5, 200, 200))
    allowed = torch.rand(2, 1, 5, 200) > 0.5
    allowed[..., 0] = True

    def value_and_gradients(dtype, attend=None):
        network = copy.deepcopy(ours) if autocast else copy.deepcopy(ours).to(dtype)
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16),
            mock.patch.object(masked_attention, "_attention_by_products", attend or masked_attention._attention_by_products),
        ):
            result = network(*inputs, allowed)[0]
        result.float().square().sum().backward()
        return [result.detach(), *(x.grad for x in (*inputs, *network.parameters()))]

    exact = value_and_gradients(torch.float32)
    products = value_and_gradients(torch.bfloat16)
    fused = value_and_gradients(torch.bfloat16, nn.functional.scaled_dot_product_attention)
    for mine, theirs, right in zip(products, fused, exact, strict=True):
        assert mine.dtype == theirs.dtype
        error, usual = (mine - right).norm(), (theirs - right).norm()
        assert error <= 1.5 * usual + 1e-3 * right.norm()


def test_masked_cross_attention_equals_multihead_attention():
    ours = MaskedCrossAttention(16, 4)
    stock = nn.MultiheadAttention(16, 4)
    stock.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(5, 2, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    allowed = torch.rand(2, 1, 5, 9) > 0.5
    allowed[..., 0] = True
    expected, _ = stock(query, key, value, attn_mask=~allowed.expand(-1, 4, -1, -1).flatten(0, 1))
    torch.testing.assert_close(ours(query, key, value, attn_mask=allowed)[0], expected)
