"""Multi-scale deformable attention (Deformable DETR) as weighted sums of table rows.

A bilinear sample is a weighted sum of four cells, so what one head reads for one query is one weighted sum of 4 L P rows
of the values: `embedding_bag` makes it without ever storing the samples.

Shape letters: B images, M cells of all levels, N query positions, A heads, D channels per head, L levels, P points,
K = 4 L P rows of a sum, T = B M A rows of the table, S = B N A sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)


def multi_scale_deformable_attention(
    value_BMAD: Tensor,
    spatial_shapes: list[tuple[int, int]],
    locations_BNALP2: Tensor,
    weights_BNALP: Tensor,
) -> Tensor:
    """Weighted bilinear samples of every level -> (B, N, A * D), in the dtype of `value_BMAD`.

    The same values as transformers' function of this name, in float32: half-precision coordinates are off by a good part
    of a cell. Cells outside a level count as zero.
    """
    batch_size, num_cells, num_heads, head_dim = value_BMAD.shape
    num_queries = locations_BNALP2.shape[1]
    rows_SK, weights_SK = _corner_cells(spatial_shapes, locations_BNALP2.float(), weights_BNALP.float(), num_cells)
    table_TD = value_BMAD.float().reshape(batch_size * num_cells * num_heads, head_dim)
    sums_SD = _WeightedRowSums.apply(table_TD, rows_SK, weights_SK)
    return sums_SD.view(batch_size, num_queries, num_heads * head_dim).to(value_BMAD.dtype)


def _corner_cells(
    spatial_shapes: list[tuple[int, int]], locations_BNALP2: Tensor, weights_BNALP: Tensor, num_cells: int
) -> tuple[Tensor, Tensor]:
    """The four cells around every sampling point: their rows in the table (S, K) int32, and their weights (S, K)."""
    batch_size, _, num_heads, _, _ = weights_BNALP.shape
    device = weights_BNALP.device
    sizes_L2 = torch.tensor([(width, height) for height, width in spatial_shapes], device=device, dtype=torch.int32)
    cells_L = sizes_L2.prod(-1, dtype=torch.int32)
    starts_L1 = (cells_L.cumsum(0, dtype=torch.int32) - cells_L)[:, None]

    # In cells; a cell's centre is at a whole number. In grid_sample's own steps: a point on a centre, where Deformable DETR's
    # initial offsets lie, must fall on the same side, or the gradient of the location is another cell's.
    grid_BNALP2 = 2 * locations_BNALP2 - 1
    points_BNALP2 = ((grid_BNALP2 + 1) * sizes_L2[:, None, :] - 1) / 2
    low_BNALP2 = points_BNALP2.detach().floor()
    after_BNALP2 = points_BNALP2 - low_BNALP2
    low_BNALP2 = low_BNALP2.clamp_(-2, max(max(shape) for shape in spatial_shapes)).to(torch.int32)
    x_low, y_low = low_BNALP2.unbind(-1)
    x_after, y_after = after_BNALP2.unbind(-1)
    widths_L1, heights_L1 = sizes_L2[:, :1], sizes_L2[:, 1:]
    left, right, x_left, x_right = _neighbours(x_low, x_after, widths_L1)
    above, below, y_above, y_below = _neighbours(y_low, y_after, heights_L1)

    images_B = torch.arange(batch_size, device=device, dtype=torch.int32)
    heads_A = torch.arange(num_heads, device=device, dtype=torch.int32)
    origin = (images_B[:, None, None, None, None] * num_cells + starts_L1) * num_heads + heads_A[:, None, None]
    x_left, x_right = x_left * num_heads + origin, x_right * num_heads + origin
    y_above, y_below = y_above * (widths_L1 * num_heads), y_below * (widths_L1 * num_heads)
    rows = torch.stack((y_above + x_left, y_above + x_right, y_below + x_left, y_below + x_right), -1)
    above, below = above * weights_BNALP, below * weights_BNALP
    weights = torch.stack((above * left, above * right, below * left, below * right), -1)
    return rows.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def _neighbours(low: Tensor, after: Tensor, size_L1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and (clamped) indices of the two cells around a point of one axis; outside the level the weight is zero."""
    zero = torch.zeros((), dtype=torch.int32, device=low.device)
    last_L1 = size_L1 - 1
    first, second = low.clamp(min=zero, max=last_L1), (low + 1).clamp(min=zero, max=last_L1)
    return (1 - after) * (first == low), after * (second == low + 1), first, second


class _WeightedRowSums(torch.autograd.Function):
    """sum over k of weights[s, k] * table[rows[s, k]] -> (S, D), with a backward that sorts 32-bit keys.

    The gradient of the table is a weighted sum of rows as well, of the gradient's rows, once the (s, k) pairs are in the
    order of the table; `embedding_bag`'s own backward sorts 64-bit keys for the same numbers, which takes longer.
    """

    @staticmethod
    def forward(ctx: Any, table_TD: Tensor, rows_SK: Tensor, weights_SK: Tensor) -> Tensor:
        ctx.save_for_backward(table_TD, rows_SK, weights_SK)
        return nn.functional.embedding_bag(rows_SK, table_TD, mode="sum", per_sample_weights=weights_SK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table_TD, rows_SK, weights_SK = ctx.saved_tensors
        grad_SD = grad_SD.contiguous()
        grad_table_TD = grad_weights_SK = None
        rows = rows_SK.flatten()
        if ctx.needs_input_grad[0]:
            order = rows.sort(stable=True).indices
            counts_T = torch.bincount(rows, minlength=len(table_TD))
            grad_table_TD = nn.functional.embedding_bag(
                order.div(rows_SK.shape[1], rounding_mode="floor"),
                grad_SD,
                offsets=counts_T.cumsum(0) - counts_T,
                mode="sum",
                per_sample_weights=weights_SK.flatten()[order],
            )
        if ctx.needs_input_grad[2]:
            bags = torch.arange(len(rows_SK), device=rows.device, dtype=rows.dtype).repeat_interleave(rows_SK.shape[1])
            offsets_S = torch.arange(0, rows.numel(), rows_SK.shape[1], device=rows.device, dtype=rows.dtype)
            grad_weights_SK = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_SD, table_TD, rows, offsets_S, bags, 0
            ).view_as(weights_SK)
        return grad_table_TD, None, grad_weights_SK


class SIMDeformableAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """The stock module (same weights, same result) on the function above. In `attention_mask`, True is padding."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor,
        reference_points: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
    ) -> Tensor:
        batch_size, num_cells, _ = hidden_states.shape
        value = self.value_proj(hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(attention_mask[..., None], 0.0)
        value_BMAD = value.view(batch_size, num_cells, self.n_heads, -1)

        queries = hidden_states + position_embeddings
        grid_shape = (batch_size, num_cells, self.n_heads, self.n_levels, self.n_points)
        offsets_BNALP2 = self.sampling_offsets(queries).view(*grid_shape, 2)
        weights_BNALP = self.attention_weights(queries).view(*grid_shape[:3], -1).softmax(-1).view(grid_shape)
        sizes_L2 = torch.tensor(
            [(width, height) for height, width in spatial_shapes_list], dtype=torch.float32, device=value.device
        )
        locations_BNALP2 = reference_points[:, :, None, :, None, :] + offsets_BNALP2 / sizes_L2[:, None, :]
        attended = multi_scale_deformable_attention(value_BMAD, spatial_shapes_list, locations_BNALP2, weights_BNALP)
        return self.output_proj(attended)
