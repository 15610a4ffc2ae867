"""SIMConfig: a Mask2Former configuration with our few extra fields, and the named presets."""

# No `from __future__ import annotations` here: @strict checks the fields' types only where they are not strings.

from collections.abc import Mapping
from os import PathLike
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import Mask2FormerConfig, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from .backbone_config import resolve_backbone_config

STAGES = ["stage1", "stage2", "stage3", "stage4"]


@strict
class SIMConfig(Mask2FormerConfig):
    """Configuration of `SIMForInstanceSegmentation`.

    Every field of `Mask2FormerConfig` keeps its meaning. freeze_batch_norm: the backbone's BatchNorm layers keep their
    running statistics in training (their scale and shift still learn); turn it off for a backbone without pretrained
    weights. category_ids: label -> the data set's own category id (COCO's ids have gaps), or None. box_prompts: the network can
    also be asked for the mask inside a given box (`prompt_boxes`); the presets can, a stock Mask2Former checkpoint cannot.
    """

    model_type = "sim"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - a list: transformers.Trainer adds another to it
        "mask_features",
        "auxiliary_logits",
        "encoder_last_hidden_state",
        "pixel_decoder_last_hidden_state",
        "transformer_decoder_last_hidden_state",
        "encoder_hidden_states",
        "pixel_decoder_hidden_states",
        "transformer_decoder_hidden_states",
        "attentions",
    ]

    freeze_batch_norm: bool = True
    category_ids: list[int] | None = None
    box_prompts: bool = False

    def validate_architecture(self) -> None:
        # Skips Mask2FormerConfig's own check, which only warns that a backbone other than Swin is unusual; here it is not.
        super(Mask2FormerConfig, self).validate_architecture()
        if self.category_ids is not None and len(self.category_ids) != self.num_labels:
            raise ValueError(f"category_ids must name one id per label ({self.num_labels}), got {len(self.category_ids)} ids")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> tuple[dict, dict]:
        try:
            fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError) as error:  # transformers takes for granted what the next lines make sure of
            raise ValueError(f"{pretrained_model_name_or_path}: config.json holds no configuration ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{pretrained_model_name_or_path}: config.json holds a {type(fields).__name__} and not an object")
        # A stock Mask2Former checkpoint is one of ours; transformers would warn of the other name.
        if fields.get("model_type") == Mask2FormerConfig.model_type:
            fields["model_type"] = cls.model_type
        return fields, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        try:
            return super().from_dict(_without_known_pipelines(config_dict), **kwargs)
        except (AttributeError, LookupError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"not a configuration of {cls.model_type!r}: {' '.join(str(error).split())}") from error

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        id2label: Mapping[int, str] | None = None,
        backbone: str | Mapping[str, Any] | PreTrainedConfig | None = None,
        **overrides: Any,
    ) -> Self:
        """The configuration called `name` (see `PRESETS`), with another backbone or other fields if given.

        backbone: a backbone configuration (object or dict), a transformers model type ("convnext", "dinov2") or a timm
        model ("timm:convnext_tiny"). Nothing is downloaded.

        Examples:
            >>> config = SIMConfig.from_preset("tiny", id2label={0: "bird", 1: "gecko"}, num_queries=50)
            >>> config.num_queries, config.label2id["gecko"], config.backbone_config.backbone
            (50, 1, 'mobilenetv2_100')
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        fields = {"box_prompts": True, **PRESETS[name], **overrides}
        fields["backbone_config"] = resolve_backbone_config(fields["backbone_config"] if backbone is None else backbone)
        if id2label is not None:
            names = {int(label): str(text) for label, text in id2label.items()}
            if sorted(names) != list(range(len(names))):
                raise ValueError(f"id2label must number the classes 0..{len(names) - 1}, got keys {sorted(names)}")
            fields["id2label"] = names
            fields["label2id"] = {text: label for label, text in names.items()}
        return cls(**fields)


def _without_known_pipelines(fields: dict[str, Any]) -> dict[str, Any]:
    """A pipeline that came with the weights is for those who have none: for a task that is registered transformers would still
    insist on running its code."""
    pipelines = fields.get("custom_pipelines") or {}
    kept = {task: entry for task, entry in pipelines.items() if task not in PIPELINE_REGISTRY.supported_tasks}
    return fields if len(kept) == len(pipelines) else {**fields, "custom_pipelines": kept}


PRESETS: dict[str, dict[str, Any]] = {
    # Small enough to train on a CPU in minutes: 3.5 M parameters, 256 px images.
    "tiny": {
        "backbone_config": {"model_type": "timm_backbone", "backbone": "mobilenetv2_100", "out_indices": [1, 2, 3, 4]},
        "feature_size": 128,
        "mask_feature_size": 128,
        "hidden_dim": 128,
        "encoder_layers": 2,
        "decoder_layers": 5,  # counts the prediction before the first layer, as in Mask2FormerConfig: 4 real layers
        "num_attention_heads": 4,
        "encoder_feedforward_dim": 512,
        "dim_feedforward": 512,
        "num_queries": 30,
    },
    "r50": {"backbone_config": {"model_type": "resnet", "depths": [3, 4, 6, 3], "out_features": STAGES}},
    "r101": {"backbone_config": {"model_type": "resnet", "depths": [3, 4, 23, 3], "out_features": STAGES}},
    "swin-t": {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 96,
            "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24],
            "drop_path_rate": 0.3,
            "out_features": STAGES,
        }
    },
    "swin-b": {
        "backbone_config": {
            "model_type": "swin",
            "image_size": 384,
            "window_size": 12,
            "embed_dim": 128,
            "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32],
            "drop_path_rate": 0.3,
            "out_features": STAGES,
        }
    },
}
