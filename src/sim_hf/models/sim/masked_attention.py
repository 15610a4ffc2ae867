"""The transformer decoder: queries read the image inside their own predicted mask, and nowhere in the padding.

Shape letters: B images, Q queries, C channels, A heads, D channels per head, M cells of one level, H and W rows, columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerMaskedAttentionDecoderOutput,
    Mask2FormerTransformerModule,
)

from .configuration_sim import SIMConfig
from .padding import downsample_valid, sine_position_embedding


class MaskedCrossAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention (same weights) through scaled_dot_product_attention; True in `attn_mask` means "look here".

    query: (Q, B, C); key and value: (M, B, C); attn_mask: (B, 1, Q, M) bool, the same for every head.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, key_padding_mask: None = None
    ) -> tuple[Tensor, None]:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)

        def heads(states: Tensor, index: int) -> Tensor:
            # Image first: then the rows of a level lie one after the other, and the projection is a single matrix product.
            projected = nn.functional.linear(states.transpose(0, 1), weights[index], biases[index])
            return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        dropout = self.dropout if self.training else 0.0
        attended_BAQD = nn.functional.scaled_dot_product_attention(
            heads(query, 0), heads(key, 1), heads(value, 2), attn_mask=attn_mask, dropout_p=dropout
        )
        return self.out_proj(attended_BAQD.permute(2, 0, 1, 3).flatten(2)), None


class SIMMaskedAttentionDecoder(Mask2FormerMaskedAttentionDecoder):
    """Mask2Former's decoder; where a query may look is decided on the level's own grid.

    The bilinear resize of the mask logits is linear, so the logits made from resized mask features are the resized
    logits: full-size masks are needed only for the predictions that somebody asks for.
    """

    def __init__(self, config: SIMConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.cross_attn = MaskedCrossAttention(config.hidden_dim, config.num_attention_heads, config.dropout)

    def forward(
        self,
        query_features: Tensor,
        query_positions: Tensor,
        mask_features_BCHW: Tensor,
        level_states: list[Tensor],
        level_positions: list[Tensor],
        level_shapes: list[tuple[int, int]],
        valid_BHW: Tensor | None,
        output_auxiliary_masks: bool = False,
        output_attentions: bool = False,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """Refine the queries, sequence first: queries (Q, B, C), each level (M, B, C).

        `intermediate_hidden_states` has the normalised queries before the first and after each layer;
        `masks_queries_logits` the masks of all of them, or of the last one only.
        """
        regions = [self._region(mask_features_BCHW, valid_BHW, shape) for shape in level_shapes]
        hidden_states = query_features
        normalised = [self.layernorm(hidden_states)]
        all_hidden_states, attentions = [hidden_states], []
        for index, layer in enumerate(self.layers):
            level = index % self.num_feature_levels
            outputs = layer(
                hidden_states,
                level,
                None,
                level_positions,
                query_positions,
                level_states,
                encoder_attention_mask=self._where_to_look(normalised[-1], *regions[level]),
                output_attentions=output_attentions,
            )
            hidden_states = outputs[0]
            normalised.append(self.layernorm(hidden_states))
            all_hidden_states.append(hidden_states)
            if output_attentions:
                attentions.append(outputs[1])
        predicted = normalised if output_auxiliary_masks else normalised[-1:]
        masks = tuple(self._mask_logits(states, mask_features_BCHW) for states in predicted)
        return Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=hidden_states.transpose(0, 1),
            hidden_states=tuple(all_hidden_states),  # pyright: ignore[reportArgumentType]  # typed as a one-tuple upstream
            attentions=tuple(attentions) if output_attentions else None,  # pyright: ignore[reportArgumentType]
            intermediate_hidden_states=tuple(normalised),
            masks_queries_logits=masks,  # pyright: ignore[reportArgumentType]
        )

    def _mask_logits(self, states_QBC: Tensor, mask_features_BCHW: Tensor) -> Tensor:
        embeddings_BQC = self.mask_predictor.mask_embedder(states_QBC.transpose(0, 1))
        return torch.einsum("bqc,bchw->bqhw", embeddings_BQC, mask_features_BCHW)

    @torch.no_grad()
    def _region(
        self, mask_features_BCHW: Tensor, valid_BHW: Tensor | None, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Mask features on the grid of a level, and its image cells as (B, 1, M)."""
        features = nn.functional.interpolate(mask_features_BCHW, size=shape, mode="bilinear", align_corners=False)
        if valid_BHW is None:
            return features, None
        valid_B1M = downsample_valid(valid_BHW, shape).flatten(1)[:, None]
        # An image that is padding alone looks everywhere: attention over nothing would be NaN.
        return features, valid_B1M | ~valid_B1M.any(-1, keepdim=True)

    @torch.no_grad()
    def _where_to_look(self, states_QBC: Tensor, features_BCHW: Tensor, valid_B1M: Tensor | None) -> Tensor:
        """The cells each query may attend to: its mask, or the whole image where that is empty -> (B, 1, Q, M) bool."""
        inside_BQM = self._mask_logits(states_QBC, features_BCHW).flatten(2) >= 0
        if valid_B1M is not None:
            inside_BQM = inside_BQM & valid_B1M
        fallback_B1M = True if valid_B1M is None else valid_B1M
        return torch.where(inside_BQM.any(-1, keepdim=True), inside_BQM, fallback_B1M)[:, None]


class SIMTransformerModule(Mask2FormerTransformerModule):
    """Queries and decoder."""

    def __init__(self, in_features: int, config: SIMConfig) -> None:
        super().__init__(in_features, config)
        self.decoder = SIMMaskedAttentionDecoder(config)

    def forward(
        self,
        multi_scale_features: tuple[Tensor, ...],
        mask_features: Tensor,
        valid_BHW: Tensor | None = None,
        output_auxiliary_masks: bool = False,
        output_attentions: bool = False,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        states, positions, shapes = [], [], []
        for level, feature_BCHW in enumerate(multi_scale_features):
            shape = (feature_BCHW.shape[2], feature_BCHW.shape[3])
            projected = self.input_projections[level](feature_BCHW).flatten(2)
            states.append((projected + self.level_embed.weight[level][None, :, None]).permute(2, 0, 1))
            position = sine_position_embedding(
                None if valid_BHW is None else downsample_valid(valid_BHW, shape),
                shape,
                self.queries_features.embedding_dim,
                device=feature_BCHW.device,
                dtype=feature_BCHW.dtype,
            )
            positions.append(position.flatten(2).permute(2, 0, 1))
            shapes.append(shape)
        batch_size = mask_features.shape[0]
        return self.decoder(
            query_features=self.queries_features.weight[:, None].expand(-1, batch_size, -1),
            query_positions=self.queries_embedder.weight[:, None].expand(-1, batch_size, -1),
            mask_features_BCHW=mask_features,
            level_states=states,
            level_positions=positions,
            level_shapes=shapes,
            valid_BHW=valid_BHW,
            output_auxiliary_masks=output_auxiliary_masks,
            output_attentions=output_attentions,
        )
