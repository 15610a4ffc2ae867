"""SIM's network on Mask2Former. Importing this registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
)

from .backbone_weights import BackboneReport, load_backbone_weights
from .class_transfer import ClassTransferReport, load_pretrained_for_classes
from .configuration_sim import PRESETS, SIMConfig
from .image_processing_sim import SIMImageProcessor
from .modeling_sim import (
    SIMForInstanceSegmentation,
    SIMForInstanceSegmentationOutput,
    SIMModel,
    SIMPreTrainedModel,
)
from .remote_code import save_with_code

AutoConfig.register(SIMConfig.model_type, SIMConfig)
AutoModel.register(SIMConfig, SIMModel)
AutoModelForInstanceSegmentation.register(SIMConfig, SIMForInstanceSegmentation)
AutoModelForUniversalSegmentation.register(SIMConfig, SIMForInstanceSegmentation)
# Of the three, the one that pipeline("image-segmentation") looks into.
AutoModelForImageSegmentation.register(SIMConfig, SIMForInstanceSegmentation)
AutoImageProcessor.register(SIMConfig, image_processor_classes={"torchvision": SIMImageProcessor})

__all__ = [
    "PRESETS",
    "BackboneReport",
    "ClassTransferReport",
    "SIMConfig",
    "SIMForInstanceSegmentation",
    "SIMForInstanceSegmentationOutput",
    "SIMImageProcessor",
    "SIMModel",
    "SIMPreTrainedModel",
    "load_backbone_weights",
    "load_pretrained_for_classes",
    "save_with_code",
]
