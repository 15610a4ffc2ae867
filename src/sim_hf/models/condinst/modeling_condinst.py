"""CondInstForInstanceSegmentation: FCOS with a mask head of its own for every instance (arXiv 2003.05664).

What it finds comes in the form of a query model's predictions, a detection a query, so that whatever reads those reads these.
Training reads the dense predictions instead; the loss is not part of the model.

Shape letters: B images, Q detections of the image that has most, P boxes asked for, K classes, C channels, M locations of all
levels, N chosen locations, H and W rows and columns of the input, h and w of the mask grid (stride 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput

from ..sim.backbone import Backbone
from ..sim.padding import PADDING_LOGIT, clear_padding, downsample_valid
from ..sim.strict_loading import LoadsCompletely
from .configuration_condinst import STRIDES, CondInstConfig
from .deformable_convolution import make_deformable
from .detections import (
    answering_locations,
    class_logits_of,
    decoded_boxes,
    detect,
    detection_scores,
    prompt_class_logits,
)
from .dynamic_mask_head import dynamic_masks, num_parameters
from .fcos_head import FIRST_DISTANCE, PRIOR_PROBABILITY, ClassPredictor, FCOSHead, level_locations
from .feature_pyramid import FPN, BiFPN, BiFPNLayer
from .mask_branch import MaskBranch


@dataclass
class CondInstForInstanceSegmentationOutput(ModelOutput):
    """What `CondInstForInstanceSegmentation` returns.

    class_queries_logits: (B, Q, K + 1), whose softmax is the score of a detection for its class and the rest for "no object";
    masks_queries_logits: (B, Q, h, w); boxes_queries: (B, Q, 4) xyxy input pixels. class_prompts_logits, masks_prompts_logits:
    the same for the boxes of `prompt_boxes`, (B, P, K + 1) and (B, P, h, w). None of these where the dense predictions are
    wanted.

    class_logits (B, M, K), box_distances (B, M, 4; left, top, right, bottom in input pixels), centerness_logits (B, M) and
    controllers (B, M, numbers of a mask head): the dense predictions. locations: (M, 2) their x and y; location_scales: (M,) what
    an instance's coordinates are divided by; valid_locations: (B, M) int64, 1 where it is image. mask_features: (B, C, h/2, w/2);
    mask_maps: what the mask heads read, on the same grid. hidden_states: P3 to P7, when asked for. loss stays None.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    boxes_queries: Tensor | None = None
    class_prompts_logits: Tensor | None = None
    masks_prompts_logits: Tensor | None = None
    class_logits: Tensor | None = None
    box_distances: Tensor | None = None
    centerness_logits: Tensor | None = None
    controllers: Tensor | None = None
    locations: Tensor | None = None
    location_scales: Tensor | None = None
    valid_locations: Tensor | None = None
    mask_features: Tensor | None = None
    mask_maps: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def mask_logits(self, image_ids_N: Tensor, locations_N: Tensor) -> Tensor:
        """Masks of the instances at these locations (rows of the dense predictions; `image_ids_N` ascending) -> (N, h, w)"""
        maps, controllers, places, scales = self.mask_maps, self.controllers, self.locations, self.location_scales
        assert maps is not None and controllers is not None and places is not None and scales is not None
        masks_NHW = dynamic_masks(
            maps,
            controllers[image_ids_N, locations_N],
            image_ids_N,
            places[locations_N],
            scales[locations_N],
            stride=STRIDES[0],
        )
        return _doubled(masks_NHW[:, None])[:, 0]


class CondInstPreTrainedModel(LoadsCompletely, PreTrainedModel):
    config: CondInstConfig
    config_class = CondInstConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # pyright: ignore[reportAssignmentType]  # as the library's own models have it
    accepts_loss_kwargs = False
    _no_split_modules = ["FCOSHead", "MaskBranch"]  # noqa: RUF012

    def get_input_embeddings(self) -> None:
        """Pixels have none. Accelerate asks when it shards a network (FSDP), and transformers raises for networks of images."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers asks for parts that hold parameters themselves only, after the parts in them.
        if isinstance(module, ClassPredictor):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.constant_(cast(Tensor, module.bias), -math.log(1 / PRIOR_PROBABILITY - 1))
        elif isinstance(module, FCOSHead):
            for convolution in module.modules():
                if isinstance(convolution, nn.Conv2d):
                    init.normal_(convolution.weight, std=self.config.initializer_range)
            init.constant_(cast(Tensor, module.box_predictor.bias), FIRST_DISTANCE)
            init.ones_(module.scales)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BiFPNLayer):
            init.ones_(module.down_weights)
            init.ones_(module.up_weights)
        else:
            super()._init_weights(module)


class PixelLevelModule(Backbone):
    """Backbone (`encoder`) and neck (`decoder`): an image to the maps P3 to P7."""

    def __init__(self, config: CondInstConfig) -> None:
        encoder = AutoBackbone.from_config(config.backbone_config)
        if config.deformable:
            make_deformable(encoder)
        super().__init__(encoder, strides=STRIDES[:3], freeze_batch_norm=config.freeze_batch_norm)
        channels = self.encoder.channels
        if config.neck == "bifpn":
            self.decoder = BiFPN(channels, config.feature_size, config.num_bifpn_layers)
        else:
            self.decoder = FPN(channels, config.feature_size)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        return self.decoder(self.feature_maps(pixel_values))


class CondInstModel(CondInstPreTrainedModel):
    """Backbone and neck, without the heads."""

    _keys_to_ignore_on_load_unexpected = [r"class_predictor\..*", r"head\..*", r"mask_branch\..*"]  # noqa: RUF012

    def __init__(self, config: CondInstConfig) -> None:
        super().__init__(config)
        self.pixel_level_module = PixelLevelModule(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        original_sizes: Tensor | None = None,
        input_sizes: Tensor | None = None,
    ) -> BaseModelOutput | tuple:
        """pixel_values: (B, 3, H, W); pixel_mask: (B, H, W), nonzero where there is image. `hidden_states` are P3 to P7, zero in
        the padding, and `last_hidden_state` is P3. original_sizes, input_sizes: not read, as in `SIMModel`."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        valid_BHW = valid_pixels(pixel_values, pixel_mask)
        pixel_values = pixel_values.to(self.dtype)
        if valid_BHW is not None:
            pixel_values = pixel_values.masked_fill(~valid_BHW[:, None], 0.0)
        # Convolutions keep their input's format; with channels last they need no reordering.
        levels = self.pixel_level_module(pixel_values.contiguous(memory_format=torch.channels_last))
        if valid_BHW is not None:
            levels = [x.masked_fill(~downsample_valid(valid_BHW, (x.shape[2], x.shape[3]))[:, None], 0.0) for x in levels]
        output = BaseModelOutput(
            last_hidden_state=levels[0],  # pyright: ignore[reportArgumentType]  # typed as a legacy float tensor
            hidden_states=tuple(levels) if output_hidden_states else None,  # pyright: ignore[reportArgumentType]
        )
        return output if return_dict else output.to_tuple()


class CondInstForInstanceSegmentation(CondInstPreTrainedModel):
    """`CondInstModel` with the FCOS head (`class_predictor` and `head`) and the mask branch."""

    supports_gradient_checkpointing = True  # of the towers, BiFPN, and those backbones that have it (Swin)

    def __init__(self, config: CondInstConfig) -> None:
        super().__init__(config)
        self.model = CondInstModel(config)
        controls = num_parameters(config.mask_channels, config.dynamic_channels)
        self.head = FCOSHead(config.feature_size, config.num_tower_layers, controls, STRIDES)
        self.class_predictor = ClassPredictor(config.feature_size, cast(int, config.num_labels))
        self.mask_branch = MaskBranch(
            config.feature_size, config.mask_feature_size, config.num_mask_layers, config.mask_channels, config.mask_norm
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        prompt_boxes: Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        original_sizes: Tensor | None = None,
        input_sizes: Tensor | None = None,
    ) -> CondInstForInstanceSegmentationOutput | tuple:
        """pixel_values: (B, 3, H, W) normalised; pixel_mask: (B, H, W), nonzero where there is image, None for everywhere.
        prompt_boxes: (B, P, 4), xyxy pixels of the padded input: boxes whose masks are wanted too.
        output_auxiliary_logits: only the dense predictions are wanted, which is what training asks for.
        original_sizes, input_sizes: not read, as in `SIMModel`.

        Nothing is found in the padding, and no mask reaches into it.
        """
        if labels is not None:
            raise ValueError(
                "CondInstForInstanceSegmentation computes no loss; SIMTrainer (or the training step) does, so keep `labels`"
                " out of the model's inputs"
            )
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        levels = self.model(pixel_values, pixel_mask, output_hidden_states=True, return_dict=True).hidden_states
        dense = self.head(levels, self.class_predictor)
        mask_features, mask_maps = self.mask_branch(levels)
        input_size = (pixel_values.shape[-2], pixel_values.shape[-1])
        locations_M2, level_M = level_locations(input_size, STRIDES, pixel_values.device)
        valid_BHW = valid_pixels(pixel_values, pixel_mask)
        output = CondInstForInstanceSegmentationOutput(
            class_logits=dense.class_logits_BMK,
            box_distances=dense.box_distances_BM4,
            centerness_logits=dense.centerness_logits_BM,
            controllers=dense.controllers_BMP,
            locations=locations_M2,
            location_scales=locations_M2.new_tensor(config.sizes_of_interest)[level_M],
            valid_locations=_valid_locations(valid_BHW, levels, pixel_values).long(),
            mask_features=mask_features,
            mask_maps=mask_maps,
            hidden_states=levels if output_hidden_states else None,
        )
        if not output_auxiliary_logits:
            self._add_detections(output, input_size, valid_BHW, prompt_boxes)
        return output if return_dict else output.to_tuple()

    def _add_detections(
        self,
        output: CondInstForInstanceSegmentationOutput,
        input_size: tuple[int, int],
        valid_BHW: Tensor | None,
        prompt_boxes: Tensor | None,
    ) -> None:
        """What is found, and the answers to the boxes that are given, in the form of queries."""
        dense: Any = output  # whose fields are there
        boxes_BM4 = decoded_boxes(dense.locations, dense.box_distances, input_size)
        config = self.config
        found = detect(
            dense.class_logits.detach(),
            dense.centerness_logits.detach(),
            boxes_BM4.detach(),
            dense.valid_locations.bool(),
            score_threshold=config.score_threshold,
            top_k=config.top_k,
            nms_threshold=config.nms_threshold,
            max_detections=config.max_detections,
        )
        batch_size, num_classes = len(boxes_BM4), cast(int, config.num_labels)
        num_queries = int(found.ranks_N.max()) + 1 if len(found.ranks_N) else 1
        places = (found.image_ids_N, found.ranks_N)
        nothing_1K = class_logits_of(found.labels_N.new_zeros(1), boxes_BM4.new_zeros(1), num_classes)
        class_logits_NK = class_logits_of(found.labels_N, found.scores_N, num_classes)
        output.class_queries_logits = nothing_1K.repeat(batch_size, num_queries, 1).index_put(places, class_logits_NK)
        masks_NHW = output.mask_logits(found.image_ids_N, found.locations_N)
        empty = masks_NHW.new_full((batch_size, num_queries, *masks_NHW.shape[1:]), PADDING_LOGIT)
        output.masks_queries_logits = _clear(empty.index_put(places, masks_NHW), valid_BHW)
        output.boxes_queries = boxes_BM4.new_zeros(batch_size, num_queries, 4).index_put(places, found.boxes_N4)
        if prompt_boxes is not None:
            scores_BMK = detection_scores(dense.class_logits, dense.centerness_logits)
            locations_BP = answering_locations(prompt_boxes, dense.locations, scores_BMK, boxes_BM4, dense.valid_locations.bool())
            image_ids_N = torch.arange(batch_size, device=locations_BP.device).repeat_interleave(locations_BP.shape[1])
            locations_N = locations_BP.flatten()
            answers_NK = prompt_class_logits(scores_BMK[image_ids_N, locations_N])
            output.class_prompts_logits = answers_NK.unflatten(0, locations_BP.shape)
            masks_BPHW = output.mask_logits(image_ids_N, locations_N).unflatten(0, locations_BP.shape)
            output.masks_prompts_logits = _clear(masks_BPHW, valid_BHW)


def valid_pixels(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor | None:
    if pixel_mask is None:
        return None
    expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(f"pixel_mask must be (B, H, W) = {expected} like the images, got {tuple(pixel_mask.shape)}")
    return pixel_mask.bool()


def _valid_locations(valid_BHW: Tensor | None, levels: Sequence[Tensor], pixel_values: Tensor) -> Tensor:
    """(B, M), in the order of the dense predictions."""
    batch_size, sizes = len(pixel_values), [(x.shape[2], x.shape[3]) for x in levels]
    if valid_BHW is None:
        num_locations = sum(height * width for height, width in sizes)
        return torch.ones(batch_size, num_locations, dtype=torch.bool, device=pixel_values.device)
    return torch.cat([downsample_valid(valid_BHW, size).flatten(1) for size in sizes], 1)


def _doubled(x_BCHW: Tensor) -> Tensor:
    return nn.functional.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=False)


def _clear(mask_logits_BQHW: Tensor, valid_BHW: Tensor | None) -> Tensor:
    return mask_logits_BQHW if valid_BHW is None else clear_padding(mask_logits_BQHW, valid_BHW)


# By this list of names pipeline("image-segmentation") decides whether to log an error; it does not look at what is registered.
cast(dict[str, str], MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES).setdefault(
    CondInstConfig.model_type, CondInstForInstanceSegmentation.__name__
)
