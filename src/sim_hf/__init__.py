"""Box-supervised instance segmentation: SIM (CVPR 2023) on Mask2Former, for the Hugging Face ecosystem.

Importing the package registers its configuration, model and image processor with transformers' Auto classes.
"""

__version__ = "0.1.0"

from sim_hf.data import load_coco, validate_coco
from sim_hf.evaluation import CocoEvaluator
from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.visualization import draw_instances

__all__ = [
    "CocoEvaluator",
    "SIMConfig",
    "SIMForInstanceSegmentation",
    "SIMImageProcessor",
    "__version__",
    "draw_instances",
    "load_coco",
    "validate_coco",
]
