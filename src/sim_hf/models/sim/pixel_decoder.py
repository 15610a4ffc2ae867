"""Backbone and pixel decoder: an image to mask features at stride 4 and three coarser maps, padding left out.

Shape letters: B images, C channels, M cells of all levels, H and W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoBackbone
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerPixelDecoderOutput,
    Mask2FormerPixelLevelModuleOutput,
)

from .backbone import Backbone
from .backbone_config import FEATURE_STRIDES
from .configuration_sim import SIMConfig
from .deformable_attention import SIMDeformableAttention
from .group_norm import SIMGroupNorm
from .padding import downsample_valid, sine_position_embedding


class SIMPixelDecoderEncoderLayer(GradientCheckpointingLayer, Mask2FormerPixelDecoderEncoderLayer):
    """The stock layer without its test for non-finite values, which makes a GPU wait for the host in every layer."""

    def __init__(self, config: SIMConfig) -> None:
        super().__init__(config)
        stock = self.self_attn
        self.self_attn = SIMDeformableAttention(stock.d_model, stock.n_heads, stock.n_levels, stock.n_points)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor,
        reference_points: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
    ) -> Tensor:
        def drop(states: Tensor) -> Tensor:
            return nn.functional.dropout(states, p=self.dropout, training=self.training)

        attended = self.self_attn(hidden_states, attention_mask, position_embeddings, reference_points, spatial_shapes_list)
        hidden_states = self.self_attn_layer_norm(hidden_states + drop(attended))
        transformed = self.fc2(drop(self.activation_fn(self.fc1(hidden_states))))
        return self.final_layer_norm(hidden_states + drop(transformed))


class SIMPixelDecoder(Mask2FormerPixelDecoder):
    """Mask2Former's pixel decoder, which never reads from the padding."""

    def __init__(self, config: SIMConfig, feature_channels: list[int]) -> None:
        super().__init__(config, feature_channels)
        self.encoder.layers = nn.ModuleList([SIMPixelDecoderEncoderLayer(config) for _ in range(config.encoder_layers)])
        for module in self.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = SIMGroupNorm

    def forward(self, features: list[Tensor], valid_BHW: Tensor | None = None) -> Mask2FormerPixelDecoderOutput:
        coarse_first = features[::-1][: self.num_feature_levels]
        embedded = [project(x) for project, x in zip(self.input_projections, coarse_first, strict=True)]
        outputs = self._attend(embedded, valid_BHW)
        multi_scale_features = tuple(outputs)
        fine = features[: self.num_fpn_levels][::-1]
        for feature, lateral, smooth in zip(fine, self.lateral_convolutions, self.output_convolutions, strict=True):
            current = lateral(feature)
            above = nn.functional.interpolate(outputs[-1], size=current.shape[-2:], mode="bilinear", align_corners=False)
            outputs.append(smooth(current + above))
        return Mask2FormerPixelDecoderOutput(
            mask_features=self.mask_projection(outputs[-1]),
            multi_scale_features=multi_scale_features,  # pyright: ignore[reportArgumentType]  # a one-tuple upstream
        )

    def _attend(self, embedded: list[Tensor], valid_BHW: Tensor | None) -> list[Tensor]:
        """Deformable attention across the levels -> one (B, C, h, w) map per level."""
        shapes = [(x.shape[2], x.shape[3]) for x in embedded]
        first = embedded[0]
        valid_levels = None if valid_BHW is None else [downsample_valid(valid_BHW, shape) for shape in shapes]
        positions = []
        for level, shape in enumerate(shapes):
            valid = None if valid_levels is None else valid_levels[level]
            position = sine_position_embedding(valid, shape, first.shape[1], device=first.device, dtype=first.dtype)
            positions.append(position + self.level_embed[level].view(1, -1, 1, 1))
        states_BMC = torch.cat([x.flatten(2).transpose(1, 2) for x in embedded], 1)
        positions_BMC = torch.cat([x.flatten(2).transpose(1, 2) for x in positions], 1)
        padding_BM = None if valid_levels is None else torch.cat([~valid.flatten(1) for valid in valid_levels], 1)
        reference_points = _cell_centres(shapes, first.device)
        for layer in self.encoder.layers:
            states_BMC = layer(states_BMC, padding_BM, positions_BMC, reference_points, shapes)
        levels = states_BMC.split([height * width for height, width in shapes], 1)
        return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(levels, shapes, strict=True)]


def _cell_centres(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Where each cell of each level looks by default, as fractions of the padded input -> (1, M, 1, 2) xy, float32.

    Deformable DETR scales these by the rounded-up share of image cells of each level; the shares differ between levels
    by that rounding only, which moves the points off the place they stand for. The true share is one for all levels and
    cancels, so the plain centres are exact with and without padding.
    """
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        y_HW, x_HW = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((x_HW, y_HW), -1).flatten(0, 1))
    return torch.cat(centres)[None, :, None]


class SIMPixelLevelModule(Backbone):
    """Backbone (`encoder`) and pixel decoder (`decoder`)."""

    def __init__(self, config: SIMConfig) -> None:
        encoder = AutoBackbone.from_config(config.backbone_config)
        super().__init__(encoder, strides=FEATURE_STRIDES, freeze_batch_norm=config.freeze_batch_norm)
        self.decoder = SIMPixelDecoder(config, feature_channels=self.encoder.channels)

    def forward(self, pixel_values: Tensor, valid_BHW: Tensor | None = None) -> Mask2FormerPixelLevelModuleOutput:
        features = self.feature_maps(pixel_values)
        decoded = self.decoder(features, valid_BHW)
        return Mask2FormerPixelLevelModuleOutput(
            encoder_last_hidden_state=features[-1],
            encoder_hidden_states=tuple(features),  # pyright: ignore[reportArgumentType]
            decoder_last_hidden_state=decoded.mask_features,
            decoder_hidden_states=decoded.multi_scale_features,
        )
