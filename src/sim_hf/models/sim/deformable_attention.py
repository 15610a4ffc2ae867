"""Multi-scale deformable attention (Deformable DETR) as weighted sums of table rows.

A bilinear sample is a weighted sum of four cells, so what one head reads for one query is one weighted sum of 4 K rows of
the values: `embedding_bag` makes it without ever storing the samples. Every level stands in the table with a border of
zeros, so nobody asks whether a point lies outside, and its upper left cell alone says where all four are.

On CUDA a Triton kernel does the same where it can (`deformable_attention_triton.py`), or else bilinear samples. Its atomics add
in any order: whoever asks torch for repeatable results gets the rows, there only for inputs of moderate size (at 1024 px and
batches of 16 torch's embedding_bag fails on a GPU).

Shape letters: B images, M cells of all levels, N query positions, A heads, D channels per head, L levels, P points,
K = L P points of a head, S = B N A sums, T rows of the table, 4 corners: upper left, upper right, lower left, lower right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.mask2former import modeling_mask2former
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)

from .deformable_attention_triton import DTYPES, is_installed, triton_attention

# What computes on CUDA: the kernel where it works, or else this; benchmarks/deformable_attention.py times all forms.
CUDA_FALLBACK = "grid_sample"

_BORDER = 2  # cells on every side of a level: a point far outside is moved to where all its four cells are zero


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
    attend = FORMS[_form_for(value_BMAD, locations_BNALP2.shape[-2])]
    return attend(value_BMAD, spatial_shapes, locations_BNALP2, weights_BNALP).flatten(2)


def _by_grid_samples(
    value_BMAD: Tensor, spatial_shapes: list[tuple[int, int]], locations_BNALP2: Tensor, weights_BNALP: Tensor
) -> Tensor:
    """transformers' own function, in float32."""
    sampled_BND = modeling_mask2former.multi_scale_deformable_attention(
        value_BMAD.float(), spatial_shapes, locations_BNALP2.float(), weights_BNALP.float()
    )
    return sampled_BND.to(value_BMAD.dtype).unflatten(2, (value_BMAD.shape[2], -1))


def _by_bags(
    value_BMAD: Tensor, spatial_shapes: list[tuple[int, int]], locations_BNALP2: Tensor, weights_BNALP: Tensor
) -> Tensor:
    locations_BNAK2, weights_BNAK = locations_BNALP2.float().flatten(3, 4), weights_BNALP.float().flatten(3)
    return _DeformableAttention.apply(value_BMAD, locations_BNAK2, weights_BNAK, spatial_shapes).to(value_BMAD.dtype)


# name -> function of the arguments of `multi_scale_deformable_attention`, which gives (B, N, A, D)
FORMS: dict[str, Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]] = {
    "grid_sample": _by_grid_samples,
    "bags": _by_bags,
    "triton": triton_attention,
}


def _form_for(value_BMAD: Tensor, num_points: int) -> str:
    if torch.compiler.is_exporting():  # bilinear samples are an operation of every runtime, bags of rows are not
        return "grid_sample"
    if value_BMAD.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return "bags"  # nothing of it is scattered
    works = _triton_works(value_BMAD.device, value_BMAD.dtype, value_BMAD.shape[3], num_points)
    return "triton" if works else CUDA_FALLBACK


def _triton_works(device: torch.device, dtype: torch.dtype, channels: int, num_points: int) -> bool:
    return dtype in DTYPES and is_installed() and _triton_was_tried(device, dtype, channels, num_points)


@lru_cache(maxsize=64)
def _triton_was_tried(device: torch.device, dtype: torch.dtype, channels: int, num_points: int) -> bool:
    """Whether the kernels compile here and give what the bags give, on a small case; warns where not. Draws no random number."""
    shapes = [(3, 5), (6, 4)]
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            # Waves of lengths that have nothing in common, some points outside.
            value = torch.arange(39 * 2 * channels, device=device).float().mul_(0.7).sin_().view(1, 39, 2, channels).to(dtype)
            locations = torch.arange(40 * 2 * 2 * num_points * 2, device=device).float().mul_(1.3).sin_().mul_(0.6).add_(0.5)
            weights = torch.arange(40 * 2 * 2 * num_points, device=device).float().mul_(1.7).cos_()
            leaves = [value, locations.view(1, 40, 2, 2, num_points, 2), weights.view(1, 40, 2, 2, num_points)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            results = []
            for form in ("triton", "bags"):
                sums = FORMS[form](leaves[0], shapes, leaves[1], leaves[2])
                results.append([sums.detach(), *torch.autograd.grad(sums.float().square().sum(), leaves)])
            errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*results, strict=True)]
        if all(error < 0.02 for error in errors):  # half precision rounds by up to 0.004
            return True
        reason = f"its results differ from the plain ones by {', '.join(f'{error:.1%}' for error in errors)}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler and a driver may raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    warnings.warn(f"deformable attention goes on without its Triton kernel on {device} in {dtype}: {reason}")
    return False


class _DeformableAttention(torch.autograd.Function):
    """The sums (B, N, A, D) in float32. Nothing in the backward is scattered, so its order of additions is fixed."""

    @staticmethod
    def forward(
        ctx: Any, value_BMAD: Tensor, locations_BNAK2: Tensor, weights_BNAK: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        table_TD = _bordered_table(value_BMAD, shapes)
        cells_SK, after_SK2, steps_4K = _upper_left_cells(locations_BNAK2, shapes)
        weights_SK = weights_BNAK.flatten(0, 2)
        rows_S4K = cells_SK[:, None] + steps_4K
        corner_weights_S4K = _corner_weights(after_SK2, weights_SK)
        sums_SD = nn.functional.embedding_bag(
            rows_S4K.flatten(1), table_TD, mode="sum", per_sample_weights=corner_weights_S4K.flatten(1)
        )
        ctx.save_for_backward(table_TD, cells_SK, after_SK2, weights_SK, steps_4K)
        ctx.value_shape, ctx.value_dtype, ctx.shapes = value_BMAD.shape, value_BMAD.dtype, shapes
        return sums_SD.view(*weights_BNAK.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNAD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        table_TD, cells_SK, after_SK2, weights_SK, steps_4K = ctx.saved_tensors
        grad_SD = grad_BNAD.flatten(0, 2).contiguous()
        grad_value = grad_locations = grad_weights = None
        if ctx.needs_input_grad[0]:
            corner_weights_S4K = _corner_weights(after_SK2, weights_SK)
            sums_4TD = _sums_of_cells(grad_SD, cells_SK, corner_weights_S4K, len(table_TD))
            grad_value = _add_corners(sums_4TD, ctx.value_shape, ctx.shapes).to(ctx.value_dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            products_S4K = _row_products(grad_SD, table_TD, cells_SK[:, None] + steps_4K)
            upper_left, upper_right, lower_left, lower_right = products_S4K.unbind(1)
            x_SK, y_SK = after_SK2.unbind(-1)
            upper_SK, lower_SK = upper_left.lerp(upper_right, x_SK), lower_left.lerp(lower_right, x_SK)
            grad_weights = upper_SK.lerp(lower_SK, y_SK).view(*grad_BNAD.shape[:3], -1)
            x_slopes_SK = (upper_right - upper_left).lerp_(lower_right - lower_left, y_SK).mul_(weights_SK)
            y_slopes_SK = lower_SK.sub_(upper_SK).mul_(weights_SK)
            slopes_SK2 = torch.stack((x_slopes_SK, y_slopes_SK), -1).mul_(_sizes(ctx.shapes, after_SK2))
            grad_locations = slopes_SK2.view(*grad_weights.shape, 2)
        return grad_value, grad_locations, grad_weights, None


def _bordered(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(height + 2 * _BORDER, width + 2 * _BORDER) for height, width in shapes]


def _levels(cells_BMAD: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """A view (B, h, w, A, D) of every level."""
    parts = cells_BMAD.split([height * width for height, width in shapes], 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _bordered_table(value_BMAD: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """The values, every level in a border of zeros -> (T, D) float32."""
    batch_size, _, num_heads, head_dim = value_BMAD.shape
    outer = _bordered(shapes)
    num_cells = sum(height * width for height, width in outer)
    table = torch.zeros(batch_size, num_cells, num_heads, head_dim, device=value_BMAD.device)
    for place, level in zip(_levels(table, outer), _levels(value_BMAD, shapes), strict=True):
        place[:, _BORDER:-_BORDER, _BORDER:-_BORDER] = level
    return table.view(-1, head_dim)


def _sizes(shapes: list[tuple[int, int]], points_K2: Tensor) -> Tensor:
    """Width and height of the level of each point -> (K, 2) float32. Whole rows of K: broadcasting over P is slower."""
    num_points = points_K2.shape[-2] // len(shapes)
    return _numbers(tuple((w, h) for h, w in shapes for _ in range(num_points)), torch.float32, points_K2.device)


def _numbers(rows: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers as a tensor that nobody may change: on a GPU it is kept, since to bring numbers there makes the host wait."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _kept_numbers(rows, dtype, device)
    return torch.tensor(rows, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _kept_numbers(rows: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or no later training could use it
        return torch.tensor(rows, dtype=dtype, device=device)


def _upper_left_cells(locations_BNAK2: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Where each point is -> rows of its upper left cell (S, K) int32, what it lies after that in x and y (S, K, 2) in 0..1,
    and the steps from that row to the rows of the four corners (4, K)."""
    batch_size, _, num_heads, num_points, _ = locations_BNAK2.shape
    device = locations_BNAK2.device
    # In cells; a cell's centre is at a whole number. In grid_sample's own steps: a point on a centre, where Deformable DETR's
    # initial offsets lie, must fall on the same side, or the gradient of the location is another cell's.
    sizes_K2 = _sizes(shapes, locations_BNAK2)
    points_BNAK2 = (2 * locations_BNAK2).sub_(1).add_(1).mul_(sizes_K2).sub_(1).mul_(0.5)
    low_BNAK2 = points_BNAK2.floor()
    after_BNAK2 = points_BNAK2.sub_(low_BNAK2)
    sizes_K2 = sizes_K2.to(torch.int32)
    low_BNAK2 = low_BNAK2.to(torch.int32).clamp_(torch.full_like(sizes_K2, -_BORDER), sizes_K2)

    outer = _bordered(shapes)
    starts, num_cells = [], 0
    for height, width in outer:
        starts.append(num_cells + _BORDER * width + _BORDER)
        num_cells += height * width
    per_level = _numbers(tuple((start, width) for start, (_, width) in zip(starts, outer, strict=True)), torch.int32, device)
    starts_K, widths_K = per_level.repeat_interleave(num_points // len(shapes), 0).mul(num_heads).unbind(-1)
    images_B = torch.arange(batch_size, device=device, dtype=torch.int32) * (num_cells * num_heads)
    heads_A = torch.arange(num_heads, device=device, dtype=torch.int32)
    origin_B1AK = images_B[:, None, None, None] + heads_A[:, None] + starts_K
    x_BNAK, y_BNAK = low_BNAK2.unbind(-1)
    cells_BNAK = (x_BNAK * num_heads).add_(y_BNAK * widths_K).add_(origin_B1AK)
    right_K = torch.full_like(widths_K, num_heads)
    steps_4K = torch.stack((right_K - num_heads, right_K, widths_K, widths_K + num_heads))
    return cells_BNAK.flatten(0, 2), after_BNAK2.flatten(0, 2), steps_4K


def _corner_weights(after_SK2: Tensor, weights_SK: Tensor) -> Tensor:
    """Bilinear weights of the four cells times the weight of the point -> (S, 4, K)."""
    x_SK, y_SK = after_SK2.unbind(-1)
    lower = weights_SK * y_SK
    upper = weights_SK - lower
    lower_right, upper_right = lower * x_SK, upper * x_SK
    return torch.stack((upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right), 1)


def _sums_of_cells(grad_SD: Tensor, cells_SK: Tensor, corner_weights_S4K: Tensor, num_rows: int) -> list[Tensor]:
    """For each corner, the weighted sum of the gradients of all points with the same upper left cell -> 4 of (T, D).

    The points are sorted by that cell once, for all corners.
    """
    cells = cells_SK.flatten()
    order = cells.sort(stable=True).indices
    counts_T = torch.bincount(cells, minlength=num_rows)
    starts_T = counts_T.cumsum(0) - counts_T
    sums = order.div(cells_SK.shape[1], rounding_mode="floor")
    return [
        nn.functional.embedding_bag(
            sums, grad_SD, offsets=starts_T, mode="sum", per_sample_weights=weights_SK.flatten().index_select(0, order)
        )
        for weights_SK in corner_weights_S4K.unbind(1)
    ]


def _add_corners(sums_4TD: list[Tensor], value_shape: tuple[int, ...], shapes: list[tuple[int, int]]) -> Tensor:
    """Every cell is the upper left one of some points, the upper right one of others, ... -> (B, M, A, D)."""
    batch_size, _, num_heads, head_dim = value_shape
    grad_BMAD = sums_4TD[0].new_empty(value_shape)
    outer = _bordered(shapes)
    tables = [_levels(sums_TD.view(batch_size, -1, num_heads, head_dim), outer) for sums_TD in sums_4TD]
    corners = ((0, 0), (0, 1), (1, 0), (1, 1))  # this many rows and columns after the upper left cell
    for grad, *levels in zip(_levels(grad_BMAD, shapes), *tables, strict=True):
        height, width = grad.shape[1:3]
        parts = [
            level[:, _BORDER - y : _BORDER - y + height, _BORDER - x : _BORDER - x + width]
            for level, (y, x) in zip(levels, corners, strict=True)
        ]
        torch.add(parts[0], parts[1], out=grad)
        grad.add_(parts[2]).add_(parts[3])
    return grad_BMAD


def _row_products(grad_SD: Tensor, table_TD: Tensor, rows_S4K: Tensor) -> Tensor:
    """The scalar product of every sum's gradient with every row that it adds -> (S, 4, K).

    On a CPU as a product of two matrices at the places of a sparse one, which takes half the time of embedding_bag's own.
    """
    rows, step = rows_S4K.flatten(), rows_S4K[0].numel()
    if grad_SD.device.type != "cpu" or step > len(table_TD):  # a sparse matrix holds no more places than a full one
        return _bag_products(grad_SD, table_TD, rows_S4K)
    starts = torch.arange(0, len(rows) + 1, step, dtype=rows.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        places = torch.sparse_csr_tensor(
            starts, rows, grad_SD.new_zeros(len(rows)), (len(grad_SD), len(table_TD)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(places, grad_SD, table_TD.t(), beta=0.0).values().view(rows_S4K.shape)


def _bag_products(grad_SD: Tensor, table_TD: Tensor, rows_S4K: Tensor) -> Tensor:
    rows, step = rows_S4K.flatten(), rows_S4K[0].numel()
    sums = torch.arange(len(grad_SD), device=rows.device, dtype=rows.dtype).repeat_interleave(step)
    starts = torch.arange(0, len(rows), step, device=rows.device, dtype=rows.dtype)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad_SD, table_TD, rows, starts, sums, 0)
    return products.view(rows_S4K.shape)


def _softmax(logits_BNAK: Tensor) -> Tensor:
    """Over K, in float32 at least. On a CPU in whole vectors of 16 numbers: rows of 12, shorter than a vector, take nine times
    as long."""
    missing = -logits_BNAK.shape[-1] % 16 if logits_BNAK.device.type == "cpu" else 0
    logits_BNAK = logits_BNAK.to(torch.promote_types(logits_BNAK.dtype, torch.float32))
    logits_BNAK = nn.functional.pad(logits_BNAK, (0, missing), value=float("-inf"))
    return logits_BNAK.softmax(-1)[..., : logits_BNAK.shape[-1] - missing]


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
            value = value.masked_fill_(attention_mask[..., None], 0.0)
        value_BMAD = value.view(batch_size, num_cells, self.n_heads, -1)

        queries = hidden_states + position_embeddings
        heads = (batch_size, num_cells, self.n_heads)
        weights_BNAK = _softmax(self.attention_weights(queries).view(*heads, -1))
        offsets_BNAK2 = self.sampling_offsets(queries).view(*heads, -1, 2)
        # Whole rows of K again: added to (L, P, 2), a pair of numbers at a time, these two lines take ten times as long.
        centres_BN1K2 = reference_points.expand(-1, -1, self.n_levels, -1).repeat_interleave(self.n_points, 2)[:, :, None]
        locations_BNAK2 = offsets_BNAK2 / _sizes(spatial_shapes_list, offsets_BNAK2) + centres_BN1K2
        points = (self.n_levels, self.n_points)
        attended = multi_scale_deformable_attention(
            value_BMAD, spatial_shapes_list, locations_BNAK2.unflatten(3, points), weights_BNAK.unflatten(3, points)
        )
        return self.output_proj(attended)
