"""From COCO files and pictures to batches."""

from sim_hf.data.annotation_file import AnnotationError, write_coco
from sim_hf.data.augmentation import EvalTransform, TrainTransform
from sim_hf.data.category_ids import category_ids
from sim_hf.data.coco import load_coco
from sim_hf.data.collator import DetectionCollator, denormalize, normalize
from sim_hf.data.hub import load_detection_dataset
from sim_hf.data.images import ImageError, read_image, read_image_size
from sim_hf.data.masks import decode_segmentation, encode_rle
from sim_hf.data.mixture import MixedRows
from sim_hf.data.mosaic import MosaicDataset
from sim_hf.data.sampler import SeededDataset, SeededIterable, StepSampler, sample_seed
from sim_hf.data.scenes import CLASS_NAMES, Scene, render_scene, write_scenes
from sim_hf.data.validation import validate_coco

__all__ = [
    "CLASS_NAMES",
    "AnnotationError",
    "DetectionCollator",
    "EvalTransform",
    "ImageError",
    "MixedRows",
    "MosaicDataset",
    "Scene",
    "SeededDataset",
    "SeededIterable",
    "StepSampler",
    "TrainTransform",
    "category_ids",
    "decode_segmentation",
    "denormalize",
    "encode_rle",
    "load_coco",
    "load_detection_dataset",
    "normalize",
    "read_image",
    "read_image_size",
    "render_scene",
    "sample_seed",
    "validate_coco",
    "write_coco",
    "write_scenes",
]
