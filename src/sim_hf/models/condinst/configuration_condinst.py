"""CondInstConfig and the named presets: the paper's networks, and one for a CPU."""

# No `from __future__ import annotations` here: @strict checks the fields' types only where they are not strings.

from collections.abc import Mapping
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..sim.backbone_config import resolve_backbone_config

NECKS = ("fpn", "bifpn")
NORMS = ("group", "batch")
STRIDES = (8, 16, 32, 64, 128)
STAGES = ["stage2", "stage3", "stage4"]


@strict
class CondInstConfig(PreTrainedConfig):
    """Configuration of `CondInstForInstanceSegmentation` (CondInst, arXiv 2003.05664, on FCOS, arXiv 1904.01355).

    backbone_config: a backbone with feature maps at strides 8, 16, 32. deformable: the 3x3 convolutions of a ResNet's last three
    stages are deformable (DCNv2). neck: fpn, or bifpn with `num_bifpn_layers`. feature_size: channels of the pyramid P3 to P7.
    num_tower_layers: convolutions of each tower of the FCOS head. mask_feature_size, num_mask_layers: channels and convolutions
    of the mask branch, whose last map holds `mask_channels`; mask_norm: its norm, group, or batch as in the authors' models.
    dynamic_channels: of the two hidden layers of an instance's own mask head. sizes_of_interest: pixels by which relative
    coordinates are divided, a level each.

    At inference: score_threshold of a class at a location, top_k locations before and max_detections after the suppression
    of boxes with an IoU above nms_threshold. freeze_batch_norm, category_ids: as in `SIMConfig`. box_prompts: whether a tool that
    has boxes may ask for the masks in them; nothing is trained for that.
    """

    model_type = "condinst"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
    attribute_map = {"hidden_size": "feature_size", "num_hidden_layers": "num_tower_layers"}  # noqa: RUF012
    keys_to_ignore_at_inference = [  # noqa: RUF012 - a list: transformers.Trainer adds another to it
        "mask_features",
        "mask_maps",
        "class_logits",
        "box_distances",
        "centerness_logits",
        "controllers",
        "valid_locations",
        "hidden_states",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    deformable: bool = False
    neck: str = "fpn"
    num_bifpn_layers: int = 6
    feature_size: int = 256
    num_tower_layers: int = 4
    mask_feature_size: int = 128
    num_mask_layers: int = 4
    mask_channels: int = 8
    mask_norm: str = "group"
    dynamic_channels: int = 8
    sizes_of_interest: list[int] | tuple[int, ...] = (64, 128, 256, 512, 1024)
    score_threshold: float = 0.05
    top_k: int = 1000
    nms_threshold: float = 0.6
    max_detections: int = 100
    initializer_range: float = 0.01
    freeze_batch_norm: bool = True
    category_ids: list[int] | None = None
    box_prompts: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        fields = self.backbone_config
        if fields is None:
            fields = PRESETS["condinst-r50-1x"]["backbone_config"]
        self.backbone_config = resolve_backbone_config(fields)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        for name, value, known in (("neck", self.neck, NECKS), ("mask_norm", self.mask_norm, NORMS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        backbone: Any = self.backbone_config
        if self.deformable and backbone.model_type != "resnet":
            raise ValueError(f"deformable needs transformers' resnet as backbone, got {backbone.model_type}")
        if len(self.sizes_of_interest) != len(STRIDES):
            raise ValueError(f"sizes_of_interest must hold one size for each of {len(STRIDES)} levels")
        if self.category_ids is not None and len(self.category_ids) != self.num_labels:
            raise ValueError(f"category_ids must name one id per label ({self.num_labels}), got {len(self.category_ids)} ids")

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

        backbone: as in `SIMConfig.from_preset`; of its feature maps the three coarsest are used. Nothing is downloaded.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        fields = {**PRESETS[name], **overrides}
        fields["backbone_config"] = _three_maps(
            resolve_backbone_config(fields["backbone_config"] if backbone is None else backbone)
        )
        if id2label is not None:
            names = {int(label): str(text) for label, text in id2label.items()}
            if sorted(names) != list(range(len(names))):
                raise ValueError(f"id2label must number the classes 0..{len(names) - 1}, got keys {sorted(names)}")
            fields["id2label"] = names
            fields["label2id"] = {text: label for label, text in names.items()}
        return cls(**fields)


def _three_maps(config: PreTrainedConfig) -> PreTrainedConfig:
    """The pyramid starts at stride 8."""
    if config.model_type == "timm_backbone":
        config.out_indices = list(config.out_indices)[-3:]
    else:
        config.out_features = list(config.out_features)[-3:]
    return config


def _resnet(depths: list[int]) -> dict[str, Any]:
    return {"model_type": "resnet", "depths": depths, "out_features": STAGES}


PRESETS: dict[str, dict[str, Any]] = {
    # Small enough to train on a CPU in minutes: 256 px images.
    "condinst-tiny": {
        "backbone_config": {"model_type": "timm_backbone", "backbone": "mobilenetv2_100", "out_indices": [2, 3, 4]},
        "feature_size": 96,
        "num_tower_layers": 2,
        "mask_feature_size": 64,
        "num_mask_layers": 2,
        # A 256 px image is a third of COCO's training size.
        "sizes_of_interest": [32, 64, 128, 256, 512],
    },
    "condinst-r50-1x": {"backbone_config": _resnet([3, 4, 6, 3])},
    "condinst-r101-3x": {"backbone_config": _resnet([3, 4, 23, 3])},
    "condinst-r101-dcn-bifpn-3x": {
        "backbone_config": _resnet([3, 4, 23, 3]),
        "deformable": True,
        "neck": "bifpn",
        "feature_size": 160,
    },
    "condinst-swin-b-3x": {
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
# Of the images: CondInst's and BoxInst's (short side 800, long side at most 1333).
PRESET_SIZES: dict[str, dict[str, int]] = {
    name: {"longest_edge": 256} if name == "condinst-tiny" else {"shortest_edge": 800, "longest_edge": 1333} for name in PRESETS
}
