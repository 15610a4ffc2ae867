"""SIMForInstanceSegmentation: transformers' Mask2Former with the padding honoured, on the same weights.

Every parameter has the name it has in Mask2FormerForUniversalSegmentation, so its checkpoints load unchanged. The loss is
not part of the model: training computes it from the outputs.

Shape letters: B images, Q queries, P box prompts, K classes, C channels, H and W rows and columns of the input, h and w of the
mask grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerModelOutput,
    Mask2FormerPreTrainedModel,
)
from transformers.utils import ModelOutput

from .box_prompts import SIMBoxPromptEncoder
from .configuration_sim import SIMConfig
from .masked_attention import SIMTransformerModule
from .padding import clear_padding
from .pixel_decoder import SIMPixelLevelModule
from .strict_loading import LoadsCompletely


@dataclass
class SIMForInstanceSegmentationOutput(ModelOutput):
    """What `SIMForInstanceSegmentation` returns.

    class_queries_logits: (B, Q, K + 1), the last class is "no object". masks_queries_logits: (B, Q, h, w) at stride 4.
    mask_features: (B, C, h, w), the pixel decoder's features that the masks are made of. auxiliary_logits: the
    predictions before the last one, when asked for. class_prompts_logits, masks_prompts_logits: the same for the boxes of
    `prompt_boxes`, (B, P, K + 1) and (B, P, h, w), also in `auxiliary_logits`. The other fields are Mask2Former's. loss stays
    None.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    class_prompts_logits: Tensor | None = None
    masks_prompts_logits: Tensor | None = None
    mask_features: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class SIMPreTrainedModel(LoadsCompletely, Mask2FormerPreTrainedModel):
    config: SIMConfig
    config_class = SIMConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["Mask2FormerMaskedAttentionDecoderLayer", "SIMPixelDecoderEncoderLayer"]  # noqa: RUF012
    # The class weights of a stock checkpoint's loss; our weights hold inference only.
    _keys_to_ignore_on_load_unexpected = [r"criterion\..*"]  # noqa: RUF012

    def get_input_embeddings(self) -> None:
        """Pixels have none. Accelerate asks when it shards a network (FSDP), and transformers raises for networks of images."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            # Mask2Former draws the scale from normal(0, 0.02), which silences a backbone that is trained from scratch.
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SIMBoxPromptEncoder):
            for linear in (module.hidden, module.out):
                init.xavier_uniform_(linear.weight)
                init.zeros_(linear.bias)


class SIMModel(SIMPreTrainedModel):
    """Backbone, pixel decoder and transformer decoder, without the class head."""

    _keys_to_ignore_on_load_unexpected = [r"criterion\..*", r"class_predictor\..*"]  # noqa: RUF012

    def __init__(self, config: SIMConfig) -> None:
        super().__init__(config)
        self.pixel_level_module = SIMPixelLevelModule(config)
        self.transformer_module = SIMTransformerModule(in_features=config.feature_size, config=config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        prompt_boxes: Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        original_sizes: Tensor | None = None,
        input_sizes: Tensor | None = None,
    ) -> Mask2FormerModelOutput | tuple:
        """pixel_values: (B, 3, H, W); pixel_mask: (B, H, W), nonzero where there is image.

        `masks_queries_logits` holds the last prediction, or all of them with `output_auxiliary_logits`. With `prompt_boxes`
        (B, P, 4) the prompts are further queries, behind the learned ones. original_sizes, input_sizes: not read; the image
        processor gives them for its post-processing, and `model(**inputs)` may pass them on.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_auxiliary_logits is None:
            output_auxiliary_logits = bool(config.output_auxiliary_logits)
        return_dict = config.return_dict if return_dict is None else return_dict

        valid_BHW = _valid_pixels(pixel_values, pixel_mask)
        pixel_values = pixel_values.to(self.dtype)
        if valid_BHW is not None:
            pixel_values = pixel_values.masked_fill(~valid_BHW[:, None], 0.0)
        # Convolutions keep their input's format; with channels last they and the attention need no reordering.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        pixels = self.pixel_level_module(pixel_values, valid_BHW)
        decoded = self.transformer_module(
            multi_scale_features=pixels.decoder_hidden_states,
            mask_features=pixels.decoder_last_hidden_state,
            valid_BHW=valid_BHW,
            prompt_boxes=prompt_boxes,
            input_size=(pixel_values.shape[-2], pixel_values.shape[-1]),
            output_auxiliary_masks=output_auxiliary_logits,
            output_attentions=output_attentions,
        )
        masks = decoded.masks_queries_logits
        if valid_BHW is not None and not self.training:
            masks = tuple(clear_padding(mask_logits, valid_BHW) for mask_logits in masks)
        output = Mask2FormerModelOutput(
            encoder_last_hidden_state=pixels.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=pixels.decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=decoded.last_hidden_state,
            encoder_hidden_states=pixels.encoder_hidden_states if output_hidden_states else None,
            pixel_decoder_hidden_states=pixels.decoder_hidden_states if output_hidden_states else None,
            transformer_decoder_hidden_states=decoded.hidden_states if output_hidden_states else None,
            transformer_decoder_intermediate_states=decoded.intermediate_hidden_states,
            masks_queries_logits=masks,  # pyright: ignore[reportArgumentType]  # typed as a one-tuple upstream
            attentions=decoded.attentions,
        )
        return output if return_dict else output.to_tuple()


class SIMForInstanceSegmentation(SIMPreTrainedModel):
    """`SIMModel` with a class head: per query a class and a mask."""

    def __init__(self, config: SIMConfig) -> None:
        super().__init__(config)
        self.model = SIMModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)  # pyright: ignore[reportOptionalOperand]
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        prompt_boxes: Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        original_sizes: Tensor | None = None,
        input_sizes: Tensor | None = None,
    ) -> SIMForInstanceSegmentationOutput | tuple:
        """pixel_values: (B, 3, H, W) normalised; pixel_mask: (B, H, W), nonzero where there is image, None for everywhere.
        prompt_boxes: (B, P, 4), xyxy pixels of the padded input: boxes whose masks are wanted too (any box may fill up an image
        that has fewer; no prediction depends on another prompt). original_sizes, input_sizes: not read, as in `SIMModel`.

        What stands in the padding has no influence. In evaluation mode no mask reaches into it; in training mode its
        logits are left as they are, so their gradient is not cut.
        """
        if labels is not None:
            raise ValueError(
                "SIMForInstanceSegmentation computes no loss; SIMTrainer (or the training step) does, so keep `labels`"
                " out of the model's inputs"
            )
        if output_auxiliary_logits is None:
            output_auxiliary_logits = bool(self.config.output_auxiliary_logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            pixel_values,
            pixel_mask,
            prompt_boxes,
            output_auxiliary_logits=output_auxiliary_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        states = outputs.transformer_decoder_intermediate_states
        if not output_auxiliary_logits:
            states = states[-1:]
        predictions = [
            self._predictions(state, mask_logits) for state, mask_logits in zip(states, outputs.masks_queries_logits, strict=True)
        ]
        output = SIMForInstanceSegmentationOutput(
            **predictions[-1],
            mask_features=outputs.pixel_decoder_last_hidden_state,
            auxiliary_logits=predictions[:-1] if output_auxiliary_logits else None,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=outputs.pixel_decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=outputs.transformer_decoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            pixel_decoder_hidden_states=outputs.pixel_decoder_hidden_states,
            transformer_decoder_hidden_states=outputs.transformer_decoder_hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()

    def resize_queries(self, num_queries: int) -> None:
        """Let the network find more objects in a picture, in place: a query finds one. The new queries are copies of the
        present ones with noise, to be trained. Fewer than now is a ValueError."""
        if num_queries < self.config.num_queries:
            raise ValueError(f"the network has {self.config.num_queries} queries; {num_queries} would throw trained ones away")
        self.model.transformer_module.resize_queries(num_queries)
        self.config.num_queries = num_queries

    def _predictions(self, states_TBC: Tensor, mask_logits_BTHW: Tensor) -> dict[str, Tensor]:
        """Classes and masks of one decoder prediction; the learned queries come first, then the prompts."""
        class_logits_BTK = self.class_predictor(states_TBC.transpose(0, 1))
        num_queries, num_prompts = self.config.num_queries, mask_logits_BTHW.shape[1] - self.config.num_queries
        if num_prompts == 0:
            return {"class_queries_logits": class_logits_BTK, "masks_queries_logits": mask_logits_BTHW}
        kinds = ("class_queries_logits", "class_prompts_logits"), ("masks_queries_logits", "masks_prompts_logits")
        return {
            name: part
            for names, logits in zip(kinds, (class_logits_BTK, mask_logits_BTHW), strict=True)
            for name, part in zip(names, logits.split([num_queries, num_prompts], 1), strict=True)
        }


def _valid_pixels(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor | None:
    if pixel_mask is None:
        return None
    expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(f"pixel_mask must be (B, H, W) = {expected} like the images, got {tuple(pixel_mask.shape)}")
    return pixel_mask.bool()


# By this list of names pipeline("image-segmentation") decides whether to log an error; it does not look at what is registered.
cast(dict[str, str], MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES).setdefault(
    SIMConfig.model_type, SIMForInstanceSegmentation.__name__
)
