"""Any backbone of transformers or timm with its feature maps at given strides, its BatchNorm frozen on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinBackbone

from .frozen_batch_norm import fold_batch_norms

PLAIN_TRANSFORMERS = ("dinov2", "dinov2_with_registers")


class Backbone(nn.Module):
    """A backbone (what `AutoBackbone` makes) as `encoder`, which gives one feature map for each of `strides`."""

    def __init__(self, encoder: Any, *, strides: Sequence[int], freeze_batch_norm: bool) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.freeze_batch_norm = freeze_batch_norm
        self.encoder = encoder
        # What checkpoints of a backbone may lack or have too much; transformers asks the parts of a model, and this is one.
        self._keys_to_ignore_on_load_missing = self.encoder._keys_to_ignore_on_load_missing
        self._keys_to_ignore_on_load_unexpected = self.encoder._keys_to_ignore_on_load_unexpected
        fold_batch_norms(self.encoder)
        if len(self.encoder.channels) != len(self.strides):
            raise ValueError(
                f"the backbone must give {len(self.strides)} feature maps, got {len(self.encoder.channels)}; set the"
                " out_features or out_indices of its configuration"
            )
        self.patch_size: int | None = None
        if self.encoder.config.model_type in PLAIN_TRANSFORMERS:
            self.patch_size = self.encoder.config.patch_size
        self._freeze_unused_parameters()

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        self._freeze_unused_parameters()
        if mode and self.freeze_batch_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze_unused_parameters(self) -> None:
        """Parameters no feature map depends on get no gradient, which distributed training takes for an error.

        Called whenever the mode is set, because from_pretrained replaces the parameters and then calls eval().
        """
        if isinstance(self.encoder, SwinBackbone):
            self.encoder.swin.layernorm.requires_grad_(False)
        if self.patch_size is not None:
            self.encoder.embeddings.mask_token.requires_grad_(False)

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """One map (B, C, h, w) for each stride, the finest first."""
        if self.patch_size is None:
            return list(self.encoder(pixel_values).feature_maps)
        return self._plain_features(pixel_values, self.patch_size)

    def _plain_features(self, pixel_values: Tensor, patch_size: int) -> list[Tensor]:
        """The maps of a plain vision transformer, resized to the strides.

        The input is resized to whole patches first: cutting the last columns off instead would shift every mask.
        """
        height, width = pixel_values.shape[-2:]
        whole = [max(round(length / patch_size), 1) * patch_size for length in (height, width)]
        resized = nn.functional.interpolate(pixel_values, size=whole, mode="bilinear", align_corners=False)
        return [
            nn.functional.interpolate(x, size=(-(-height // stride), -(-width // stride)), mode="bilinear", align_corners=False)
            for x, stride in zip(self.encoder(resized).feature_maps, self.strides, strict=True)
        ]
