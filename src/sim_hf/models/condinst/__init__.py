"""CondInst. Importing this registers it with transformers' Auto classes; its image processor is SIM's."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
)

from ..sim.image_processing_sim import SIMImageProcessor
from .configuration_condinst import PRESET_SIZES, PRESETS, CondInstConfig
from .modeling_condinst import (
    CondInstForInstanceSegmentation,
    CondInstForInstanceSegmentationOutput,
    CondInstModel,
    CondInstPreTrainedModel,
)

AutoConfig.register(CondInstConfig.model_type, CondInstConfig)
AutoModel.register(CondInstConfig, CondInstModel)
AutoModelForInstanceSegmentation.register(CondInstConfig, CondInstForInstanceSegmentation)
AutoModelForUniversalSegmentation.register(CondInstConfig, CondInstForInstanceSegmentation)
AutoModelForImageSegmentation.register(CondInstConfig, CondInstForInstanceSegmentation)
AutoImageProcessor.register(CondInstConfig, image_processor_classes={"torchvision": SIMImageProcessor})

__all__ = [
    "PRESETS",
    "PRESET_SIZES",
    "CondInstConfig",
    "CondInstForInstanceSegmentation",
    "CondInstForInstanceSegmentationOutput",
    "CondInstModel",
    "CondInstPreTrainedModel",
]
