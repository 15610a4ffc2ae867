"""Multi-scale deformable attention as two Triton kernels, forward and backward: no sample is ever stored.

One program makes what one head reads for a block of queries of one image, in float32 whatever the dtype of the values. The
gradients of locations and weights are written by the program that owns them; those of the values, which many points share,
are added by atomics, so their last bits change from run to run.

With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, for tests.

Shape letters: B images, M cells of all levels, N query positions, A heads, D channels per head, L levels, P points; lower case
in the kernels: n queries of a block, d channels filled up to a power of two.
"""

# The kernels are read by triton, whose language is not quite Python.
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the values
TILE = 1024  # numbers of an output block: queries times channels
NUM_WARPS = 4


def triton_attention(
    value_BMAD: Tensor, spatial_shapes: list[tuple[int, int]], locations_BNALP2: Tensor, weights_BNALP: Tensor
) -> Tensor:
    """The sums (B, N, A, D) in the dtype of `value_BMAD`, one of `DTYPES`; locations and weights are taken in float32."""
    shapes = tuple((int(height), int(width)) for height, width in spatial_shapes)
    return _TritonAttention.apply(value_BMAD, locations_BNALP2.float(), weights_BNALP.float(), shapes)


def is_installed() -> bool:
    return triton is not None


@lru_cache(maxsize=256)
def _levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """First cell, height and width of each level -> (L, 3) int32. Kept: to bring it to a GPU makes the host wait."""
    rows, start = [], 0
    for height, width in shapes:
        rows.append((start, height, width))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)  # for kernels only: inference mode does not mind


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_BMAD: Tensor, locations_BNALP2: Tensor, weights_BNALP: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        value_BMAD, locations, weights = (x.contiguous() for x in (value_BMAD, locations_BNALP2, weights_BNALP))
        sums_BNAD = value_BMAD.new_empty(*weights.shape[:3], value_BMAD.shape[3])
        _launch(_forward_kernel, (value_BMAD, locations, weights), shapes, (sums_BNAD,))
        ctx.save_for_backward(value_BMAD, locations, weights)
        ctx.shapes = shapes
        return sums_BNAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNAD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value_BMAD, locations, weights = ctx.saved_tensors
        grad_value = torch.zeros_like(value_BMAD, dtype=torch.float32)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        outputs = (grad_BNAD.contiguous(), grad_value, grad_locations, grad_weights)
        _launch(_backward_kernel, (value_BMAD, locations, weights), ctx.shapes, outputs)
        return grad_value.to(value_BMAD.dtype), grad_locations, grad_weights, None


def _launch(
    kernel: Any, inputs: tuple[Tensor, Tensor, Tensor], shapes: tuple[tuple[int, int], ...], outputs: tuple[Tensor, ...]
) -> None:
    value_BMAD, _, weights_BNALP = inputs
    batch_size, num_cells, num_heads, channels = value_BMAD.shape
    num_queries, num_levels, num_points = weights_BNALP.shape[1], *weights_BNALP.shape[3:]
    padded = max(triton.next_power_of_2(channels), 16)
    block = max(TILE // padded, 16)
    num_blocks = triton.cdiv(num_queries, block)
    with torch.cuda.device_of(value_BMAD):  # a kernel starts on the current GPU, whatever its arguments are on
        kernel[(batch_size * num_blocks * num_heads,)](
            *inputs,
            _levels(shapes, value_BMAD.device),
            *outputs,
            num_queries,
            num_cells,
            num_blocks,
            HEADS=num_heads,
            CHANNELS=channels,
            PADDED=padded,
            LEVELS=num_levels,
            POINTS=num_points,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


if triton is not None:

    @triton.jit
    def _block(num_queries, num_blocks, HEADS: tl.constexpr, BLOCK: tl.constexpr):
        """What this program makes: head, image, the place of each sum (image, query, head), and which are queries."""
        program = tl.program_id(0)
        head = program % HEADS
        image = (program // HEADS // num_blocks).to(tl.int64)
        n = (program // HEADS) % num_blocks * BLOCK + tl.arange(0, BLOCK)
        return head, image, (image * num_queries + n) * HEADS + head, n < num_queries

    @triton.jit
    def _level(levels, level):
        """First cell, height and width."""
        return tl.load(levels + 3 * level).to(tl.int64), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)

    @triton.jit
    def _locate(locations, place_n, is_query_n, height, width):
        """Upper left cell of each point, row and column, and what the point lies after it, 0 to 1.

        In grid_sample's own steps: a point on a centre must fall on the same side. Far outside is as good as just outside."""
        x_n = tl.load(locations + 2 * place_n, mask=is_query_n, other=0.0)
        y_n = tl.load(locations + 2 * place_n + 1, mask=is_query_n, other=0.0)
        wide, high = width.to(tl.float32), height.to(tl.float32)
        x_n = (((2 * x_n - 1) + 1) * wide - 1) * 0.5
        y_n = (((2 * y_n - 1) + 1) * high - 1) * 0.5
        left_n, top_n = tl.floor(x_n), tl.floor(y_n)
        column_n = tl.minimum(tl.maximum(left_n, -2.0), wide).to(tl.int32)
        row_n = tl.minimum(tl.maximum(top_n, -2.0), high).to(tl.int32)
        return row_n, column_n, y_n - top_n, x_n - left_n

    @triton.jit
    def _corner(row_n, column_n, height, width, is_query_n, is_channel_d, d, STRIDE: tl.constexpr):
        """Where the channels of a cell lie in its level, and whether there is such a cell."""
        is_cell_n = is_query_n & (row_n >= 0) & (row_n < height) & (column_n >= 0) & (column_n < width)
        return (row_n * width + column_n)[:, None] * STRIDE + d[None, :], is_cell_n[:, None] & is_channel_d[None, :]

    @triton.jit
    def _forward_kernel(
        value,
        locations,
        weights,
        levels,
        sums,
        num_queries,
        num_cells,
        num_blocks,
        HEADS: tl.constexpr,
        CHANNELS: tl.constexpr,
        PADDED: tl.constexpr,
        LEVELS: tl.constexpr,
        POINTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        head, image, sum_n, is_query_n = _block(num_queries, num_blocks, HEADS, BLOCK)
        d = tl.arange(0, PADDED)
        is_channel_d = d < CHANNELS
        STRIDE: tl.constexpr = HEADS * CHANNELS
        value += image * num_cells * STRIDE + head * CHANNELS
        total_nd = tl.zeros((BLOCK, PADDED), dtype=tl.float32)
        for level in range(LEVELS):
            first, height, width = _level(levels, level)
            cells = value + first * STRIDE
            for point in tl.static_range(POINTS):
                place_n = (sum_n * LEVELS + level) * POINTS + point
                weight_n = tl.load(weights + place_n, mask=is_query_n, other=0.0)
                row_n, column_n, y_n, x_n = _locate(locations, place_n, is_query_n, height, width)
                for down in tl.static_range(2):
                    for right in tl.static_range(2):
                        at_nd, is_there_nd = _corner(
                            row_n + down, column_n + right, height, width, is_query_n, is_channel_d, d, STRIDE
                        )
                        cell_nd = tl.load(cells + at_nd, mask=is_there_nd, other=0.0).to(tl.float32)
                        share_n = (y_n if down == 1 else 1 - y_n) * (x_n if right == 1 else 1 - x_n)
                        total_nd += (weight_n * share_n)[:, None] * cell_nd
        out_nd = sums + sum_n[:, None] * CHANNELS + d[None, :]
        tl.store(out_nd, total_nd.to(sums.dtype.element_ty), mask=is_query_n[:, None] & is_channel_d[None, :])

    @triton.jit
    def _backward_kernel(
        value,
        locations,
        weights,
        levels,
        grad_sums,
        grad_value,
        grad_locations,
        grad_weights,
        num_queries,
        num_cells,
        num_blocks,
        HEADS: tl.constexpr,
        CHANNELS: tl.constexpr,
        PADDED: tl.constexpr,
        LEVELS: tl.constexpr,
        POINTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        head, image, sum_n, is_query_n = _block(num_queries, num_blocks, HEADS, BLOCK)
        d = tl.arange(0, PADDED)
        is_channel_d = d < CHANNELS
        STRIDE: tl.constexpr = HEADS * CHANNELS
        own = image * num_cells * STRIDE + head * CHANNELS
        grad_nd = tl.load(
            grad_sums + sum_n[:, None] * CHANNELS + d[None, :], mask=is_query_n[:, None] & is_channel_d[None, :], other=0.0
        ).to(tl.float32)
        for level in range(LEVELS):
            first, height, width = _level(levels, level)
            start = own + first * STRIDE
            for point in tl.static_range(POINTS):
                place_n = (sum_n * LEVELS + level) * POINTS + point
                weight_n = tl.load(weights + place_n, mask=is_query_n, other=0.0)
                row_n, column_n, y_n, x_n = _locate(locations, place_n, is_query_n, height, width)
                of_weight_n = tl.zeros((BLOCK,), dtype=tl.float32)
                of_x_n = tl.zeros((BLOCK,), dtype=tl.float32)
                of_y_n = tl.zeros((BLOCK,), dtype=tl.float32)
                for down in tl.static_range(2):
                    for right in tl.static_range(2):
                        at_nd, is_there_nd = _corner(
                            row_n + down, column_n + right, height, width, is_query_n, is_channel_d, d, STRIDE
                        )
                        cell_nd = tl.load(value + start + at_nd, mask=is_there_nd, other=0.0).to(tl.float32)
                        product_n = tl.sum(grad_nd * cell_nd, axis=1)
                        vertical_n = y_n if down == 1 else 1 - y_n
                        horizontal_n = x_n if right == 1 else 1 - x_n
                        of_weight_n += product_n * vertical_n * horizontal_n
                        of_x_n += product_n * vertical_n * (2 * right - 1)
                        of_y_n += product_n * horizontal_n * (2 * down - 1)
                        share_n = weight_n * vertical_n * horizontal_n
                        tl.atomic_add(grad_value + start + at_nd, share_n[:, None] * grad_nd, mask=is_there_nd, sem="relaxed")
                tl.store(grad_weights + place_n, of_weight_n, mask=is_query_n)
                tl.store(grad_locations + 2 * place_n, of_x_n * weight_n * width.to(tl.float32), mask=is_query_n)
                tl.store(grad_locations + 2 * place_n + 1, of_y_n * weight_n * height.to(tl.float32), mask=is_query_n)
