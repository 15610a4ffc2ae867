"""Multi-scale deformable attention (Deformable DETR), accumulated level by level.

Shape letters: B images, M cells of all levels, N query positions, A heads, D channels per head, L levels, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
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

    The same values as transformers' function of this name. That one stacks the samples of all levels before the sum;
    adding level after level needs a third of the memory. Sampling is done in float32: half-precision coordinates are
    off by a good part of a cell.
    """
    batch_size, _, num_heads, head_dim = value_BMAD.shape
    num_queries = locations_BNALP2.shape[1]
    grids_BNALP2 = 2 * locations_BNALP2.float() - 1
    weights_BNALP = weights_BNALP.float()
    output = torch.zeros((), device=value_BMAD.device)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        level_value = value_BMAD[:, start : start + height * width].float()
        start += height * width
        level_value = level_value.permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_dim, height, width)
        grid = grids_BNALP2[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples = nn.functional.grid_sample(level_value, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = weights_BNALP[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        output = output + (samples * weights).sum(-1)
    output = output.view(batch_size, num_heads * head_dim, num_queries)
    return output.transpose(1, 2).contiguous().to(value_BMAD.dtype)


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
