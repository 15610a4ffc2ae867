"""From COCO files and pictures to batches."""

from sim_hf.data.augmentation import EvalTransform, TrainTransform
from sim_hf.data.collator import DetectionCollator, denormalize, normalize
from sim_hf.data.images import ImageError, read_image, read_image_size
from sim_hf.data.masks import decode_segmentation, encode_rle
from sim_hf.data.sampler import SeededDataset, SeededIterable, StepSampler, sample_seed

__all__ = [
    "DetectionCollator",
    "EvalTransform",
    "ImageError",
    "SeededDataset",
    "SeededIterable",
    "StepSampler",
    "TrainTransform",
    "decode_segmentation",
    "denormalize",
    "encode_rle",
    "normalize",
    "read_image",
    "read_image_size",
    "sample_seed",
]
