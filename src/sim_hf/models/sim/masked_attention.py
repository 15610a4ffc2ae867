"""The transformer decoder: queries read the image inside their own predicted mask, and nowhere in the padding.

Shape letters: B images, Q learned queries, P prompts, T = Q + P all queries, C channels, A heads, D channels per head, M cells
of one level, H and W rows, columns.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerAttention,
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerMaskedAttentionDecoderOutput,
    Mask2FormerTransformerModule,
)

from .box_prompts import SIMBoxPromptEncoder, cells_inside
from .configuration_sim import SIMConfig
from .padding import downsample_valid, sine_position_embedding

# Not cuDNN's, though it is the first choice on new GPUs: it makes a plan for every new shape, on the host, and the numbers of
# boxes and the sizes of a batch always change.
_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_QUERY_NOISE = 0.5  # of a copied query, in standard deviations of the learned ones; not tuned


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
        states = (heads(query, 0), heads(key, 1), heads(value, 2))
        is_slow = states[0].device.type == "cpu" and states[0].dtype == torch.bfloat16
        attend = _attention_by_products if is_slow else nn.functional.scaled_dot_product_attention
        with sdpa_kernel(_KERNELS) if states[0].is_cuda else contextlib.nullcontext():
            attended_BAQD = attend(*states, attn_mask=attn_mask, dropout_p=dropout)
        return self.out_proj(attended_BAQD.permute(2, 0, 1, 3).flatten(2)), None


def _attention_by_products(
    query_BAQD: Tensor, key_BAMD: Tensor, value_BAMD: Tensor, attn_mask: Tensor, dropout_p: float
) -> Tensor:
    """scaled_dot_product_attention as two matrix products: in bfloat16 on a CPU a third of its time forward and backward (few
    queries, many cells), for one stored map of weights. Scores are rounded to bfloat16, as in nn.MultiheadAttention."""
    outside = torch.zeros(attn_mask.shape, dtype=query_BAQD.dtype, device=query_BAQD.device)
    outside.masked_fill_(~attn_mask, float("-inf"))
    with torch.autocast("cpu", enabled=False):  # it would store the weights in float32, for a product in bfloat16
        scores_BAQM = (query_BAQD * query_BAQD.shape[-1] ** -0.5) @ key_BAMD.transpose(-2, -1)
        weights_BAQM = nn.functional.dropout(scores_BAQM.add_(outside).softmax(-1), dropout_p)
        return weights_BAQM @ value_BAMD


class QuerySelfAttention(Mask2FormerAttention):
    """Mask2FormerAttention (same weights) over the learned queries: all T queries read these, which come first, and nobody
    reads a prompt."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, num_queries: int) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.num_queries = num_queries

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        position_embeddings: Tensor | None = None,
        key_value_states: None = None,
        key_value_position_embeddings: None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, position_embeddings: (T, B, C), sequence first -> (T, B, C), and the weights (B, A, T, Q)."""
        placed = self.with_pos_embed(hidden_states, position_embeddings)
        read, read_placed = hidden_states[: self.num_queries], placed[: self.num_queries]

        def heads(states: Tensor, projection: nn.Linear) -> Tensor:
            return projection(states).unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

        queries_BATD, keys_BAQD = heads(placed, self.q_proj), heads(read_placed, self.k_proj)
        weights_BATQ = (queries_BATD * self.scaling @ keys_BAQD.transpose(-2, -1)).softmax(-1)
        dropped_BATQ = nn.functional.dropout(weights_BATQ, self.dropout, self.training)
        attended_BATD = dropped_BATQ @ heads(read, self.v_proj)
        return self.out_proj(attended_BATD.permute(2, 0, 1, 3).flatten(2)), weights_BATQ


class SIMMaskedAttentionDecoder(Mask2FormerMaskedAttentionDecoder):
    """Mask2Former's decoder; where a query may look is decided on the level's own grid.

    The bilinear resize of the mask logits is linear, so the logits made from resized mask features are the resized
    logits: full-size masks are needed only for the predictions that somebody asks for.
    """

    def __init__(self, config: SIMConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.cross_attn = MaskedCrossAttention(config.hidden_dim, config.num_attention_heads, config.dropout)
            layer.self_attn = QuerySelfAttention(
                config.hidden_dim, config.num_attention_heads, config.dropout, config.num_queries
            )

    def forward(
        self,
        query_features: Tensor,
        query_positions: Tensor,
        mask_features_BCHW: Tensor,
        level_states: list[Tensor],
        level_positions: list[Tensor],
        level_shapes: list[tuple[int, int]],
        valid_BHW: Tensor | None,
        prompted_cells: list[Tensor] | None = None,
        output_auxiliary_masks: bool = False,
        output_attentions: bool = False,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """Refine the queries, sequence first: queries (T, B, C), the prompts last; each level (M, B, C).

        prompted_cells: for each level the cells inside the boxes of the prompts (B, P, M), where they may look.
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
                encoder_attention_mask=self._where_to_look(
                    normalised[-1], *regions[level], None if prompted_cells is None else prompted_cells[level]
                ),
                output_attentions=output_attentions,
            )
            hidden_states = outputs[0]
            normalised.append(self.layernorm(hidden_states))
            all_hidden_states.append(hidden_states)
            if output_attentions:
                attentions.append(outputs[1])
        predicted = normalised if output_auxiliary_masks else normalised[-1:]
        # One product for all of them: its backward reads and makes the gradient of the mask features once.
        masks_BNHW = self._mask_logits(torch.cat(predicted), mask_features_BCHW)
        return Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=hidden_states.transpose(0, 1),
            hidden_states=tuple(all_hidden_states),  # pyright: ignore[reportArgumentType]  # typed as a one-tuple upstream
            attentions=tuple(attentions) if output_attentions else None,  # pyright: ignore[reportArgumentType]
            intermediate_hidden_states=tuple(normalised),
            masks_queries_logits=masks_BNHW.chunk(len(predicted), 1),  # pyright: ignore[reportArgumentType]
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
    def _where_to_look(
        self, states_TBC: Tensor, features_BCHW: Tensor, valid_B1M: Tensor | None, prompted_BPM: Tensor | None = None
    ) -> Tensor:
        """The cells each query may attend to: its mask, of a prompt the part in its box; where that is empty the whole box, or
        the whole image -> (B, 1, T, M) bool."""
        inside_BTM = self._mask_logits(states_TBC, features_BCHW).flatten(2) >= 0
        if prompted_BPM is not None:
            masks_BPM = inside_BTM[:, -prompted_BPM.shape[1] :]
            masks_BPM &= prompted_BPM
            masks_BPM |= prompted_BPM & ~masks_BPM.any(-1, keepdim=True)
        if valid_B1M is not None:
            inside_BTM = inside_BTM & valid_B1M
        nowhere_BT1 = ~inside_BTM.any(-1, keepdim=True)
        return (inside_BTM | (nowhere_BT1 if valid_B1M is None else nowhere_BT1 & valid_B1M))[:, None]


class SIMTransformerModule(Mask2FormerTransformerModule):
    """Queries, prompts and decoder."""

    def __init__(self, in_features: int, config: SIMConfig) -> None:
        super().__init__(in_features, config)
        self.decoder = SIMMaskedAttentionDecoder(config)
        self.box_prompt_encoder = SIMBoxPromptEncoder(config.hidden_dim) if config.box_prompts else None

    @torch.no_grad()
    def resize_queries(self, num_queries: int) -> None:
        """More queries: the present ones stay as they are and are copied in turn, each copy shifted by noise, since equal
        queries would always say the same."""
        for name in ("queries_features", "queries_embedder"):
            old = getattr(self, name)
            more = torch.arange(num_queries - old.num_embeddings, device=old.weight.device) % old.num_embeddings
            copies = old.weight[more] + _QUERY_NOISE * old.weight.std() * torch.randn_like(old.weight[more])
            new = nn.Embedding.from_pretrained(torch.cat([old.weight, copies]), freeze=not old.weight.requires_grad)
            setattr(self, name, new)
        for module in self.decoder.modules():
            if isinstance(module, QuerySelfAttention):
                module.num_queries = num_queries

    def forward(
        self,
        multi_scale_features: tuple[Tensor, ...],
        mask_features: Tensor,
        valid_BHW: Tensor | None = None,
        prompt_boxes: Tensor | None = None,
        input_size: tuple[int, int] = (0, 0),
        output_auxiliary_masks: bool = False,
        output_attentions: bool = False,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """prompt_boxes: (B, P, 4) xyxy pixels of the padded input, whose (height, width) is `input_size`."""
        states, positions, shapes = [], [], []
        # Through the modules, not their weights: a device map that keeps weights elsewhere brings them when a module is called.
        level_embed_LC = _rows(self.level_embed, mask_features.device)
        for level, feature_BCHW in enumerate(multi_scale_features):
            shape = (feature_BCHW.shape[2], feature_BCHW.shape[3])
            projected = self.input_projections[level](feature_BCHW).flatten(2)
            states.append((projected + level_embed_LC[level][None, :, None]).permute(2, 0, 1))
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
        query_features = _rows(self.queries_features, mask_features.device)[:, None].expand(-1, batch_size, -1)
        query_positions = _rows(self.queries_embedder, mask_features.device)[:, None].expand(-1, batch_size, -1)
        prompted_cells = None
        if prompt_boxes is not None:
            if self.box_prompt_encoder is None:
                raise ValueError("this network takes no box prompts: its configuration says box_prompts=False")
            content, position = self.box_prompt_encoder(prompt_boxes, input_size, valid_BHW)
            query_features, query_positions = torch.cat([query_features, content]), torch.cat([query_positions, position])
            prompted_cells = [cells_inside(prompt_boxes, input_size, shape) for shape in shapes]
        return self.decoder(
            query_features=query_features,
            query_positions=query_positions,
            mask_features_BCHW=mask_features,
            level_states=states,
            level_positions=positions,
            level_shapes=shapes,
            valid_BHW=valid_BHW,
            prompted_cells=prompted_cells,
            output_auxiliary_masks=output_auxiliary_masks,
            output_attentions=output_attentions,
        )


def _rows(embedding: nn.Embedding, device: torch.device) -> Tensor:
    return embedding(torch.arange(embedding.num_embeddings, device=device))
