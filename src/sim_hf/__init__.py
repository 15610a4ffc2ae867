"""Box-supervised instance segmentation: SIM (CVPR 2023) on Mask2Former and CondInst, for the Hugging Face ecosystem.

Importing the package registers its configuration, models and image processor with transformers' Auto classes, and the task
"instance-segmentation" with its pipelines. What else it offers is loaded when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sim_hf.models.architectures import load_model
from sim_hf.models.condinst import CondInstConfig, CondInstForInstanceSegmentation
from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.pipeline import InstanceSegmentationPipeline, register

if TYPE_CHECKING:
    from sim_hf.data import load_coco, validate_coco
    from sim_hf.evaluation import CocoEvaluator
    from sim_hf.visualization import draw_instances

__version__ = "0.1.0"

__all__ = [
    "CocoEvaluator",
    "CondInstConfig",
    "CondInstForInstanceSegmentation",
    "InstanceSegmentationPipeline",
    "SIMConfig",
    "SIMForInstanceSegmentation",
    "SIMImageProcessor",
    "__version__",
    "draw_instances",
    "load_coco",
    "load_model",
    "validate_coco",
]

_HOMES = {
    "CocoEvaluator": "sim_hf.evaluation",
    "draw_instances": "sim_hf.visualization",
    "load_coco": "sim_hf.data",
    "validate_coco": "sim_hf.data",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
