"""SIMImageProcessor: images to the network's inputs, and its outputs to instances on the original images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import ModelOutput

from .instance_postprocessing import ImageGeometry, full_masks, image_instances, label_map

Sizes = Tensor | list[tuple[int, int]]  # (height, width) per image

PRESET_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"longest_edge": 256},
    "r50": {"shortest_edge": 800, "longest_edge": 1333},
    "r101": {"shortest_edge": 800, "longest_edge": 1333},
    "swin-t": {"shortest_edge": 800, "longest_edge": 1333},
    "swin-b": {"shortest_edge": 800, "longest_edge": 1333},
}


class SIMImageProcessorKwargs(ImagesKwargs, total=False):
    """size_divisor: heights and widths of a batch are rounded up to it. mask_stride: input pixels per mask cell.
    soft_nms_sigma: of several masks of one object and class the worse ones lose score (Soft-NMS); 0: they keep it.
    max_part_gap: parts of a mask that are further away from its main one, in square roots of its area, go; None: all stay."""

    size_divisor: int
    mask_stride: int
    soft_nms_sigma: float
    max_part_gap: float | None


class SIMImageProcessor(TorchvisionBackend):
    """Resize with the aspect ratio kept, normalise, pad at the bottom and the right."""

    valid_kwargs = SIMImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size: Any = PRESET_SIZES["r50"]  # a dict here, a SizeDict on the instance
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    do_convert_rgb = True
    size_divisor = 32
    mask_stride = 4
    soft_nms_sigma = 0.5
    max_part_gap: float | None = 0.25
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> SIMImageProcessor:
        """The processor that belongs to `SIMConfig.from_preset(name)`."""
        if name not in PRESET_SIZES:
            raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESET_SIZES)}")
        fields: dict[str, Any] = {"size": PRESET_SIZES[name], **overrides}
        return cls(**fields)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A ValueError for fields that cannot be worked with; it has been tried on one pixel."""
        try:
            loaded: Any = super().from_dict(image_processor_dict, **kwargs)
            processor = loaded[0] if isinstance(loaded, tuple) else loaded
            processor.resized_size(1, 1)
            for name, lengths in (
                ("size", dict(processor.size)),
                ("size_divisor", {"": processor.size_divisor}),
                ("mask_stride", {"": processor.mask_stride}),
            ):
                if any(type(length) is not int or length < 1 for length in lengths.values()):
                    raise TypeError(f"{name} must be given in whole pixels, got {getattr(processor, name)}")
            if type(processor.soft_nms_sigma) not in (int, float) or not 0 <= processor.soft_nms_sigma < math.inf:
                raise TypeError(f"soft_nms_sigma must be a number of at least 0, got {processor.soft_nms_sigma}")
            gap = processor.max_part_gap
            if gap is not None and (type(gap) not in (int, float) or not 0 <= gap < math.inf):
                raise TypeError(f"max_part_gap must be a number of at least 0 or null, got {gap}")
            processor(images=Image.new("RGB", (1, 1)), size={"height": 1, "width": 1}, do_pad=False)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"not the preprocessing of {cls.__name__}: {error}") from error
        return loaded

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing: the long side `longest_edge`, the short side at most `shortest_edge`."""
        return _resized_size(height, width, self.size)

    def process_image(self, image: ImageInput, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(image, Image.Image):
            image = _to_rgb(image)
        elif isinstance(image, np.ndarray) and image.dtype == np.uint16:
            image = _to_8_bits(image, known_16_bits=True)
        return super().process_image(image, *args, **kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_pad: bool,
        size_divisor: int,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        processed = []
        for image in images:
            if do_resize:
                image = self._resize(image, size, resample)
            processed.append(self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std))
        input_sizes = [tuple(image.shape[-2:]) for image in processed]
        masks = [
            torch.ones(input_size, dtype=torch.int64, device=x.device)
            for input_size, x in zip(input_sizes, processed, strict=True)
        ]
        if do_pad and images:
            height = _round_up(max(height for height, _ in input_sizes), size_divisor)
            width = _round_up(max(width for _, width in input_sizes), size_divisor)
            processed = [_pad(image, height, width) for image in processed]
            masks = [_pad(mask, height, width) for mask in masks]
        data = {
            "pixel_values": processed,
            "pixel_mask": masks,
            "original_sizes": original_sizes,
            "input_sizes": input_sizes,
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _resize(self, image: Tensor, size: SizeDict, resample: Any) -> Tensor:
        if size.height and size.width:
            return self.resize(image, size=size, resample=resample)
        height, width = _resized_size(image.shape[-2], image.shape[-1], size)
        return self.resize(image, size=SizeDict(height=height, width=width), resample=resample)

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: ModelOutput,
        original_sizes: Sizes | None = None,
        input_sizes: Sizes | None = None,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        max_instances: int | None = None,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Sizes | None = None,
    ) -> list[dict[str, Any]]:
        """Instances per image, best first: `scores` (n,), `labels` (n,), `boxes` (n, 4) xyxy and `masks` (n, H, W) bool.

        original_sizes, input_sizes: (height, width) of each image before resizing and before padding, as this processor
        returned them. A score is the class probability times the mean mask probability inside the mask (Mask2Former), less
        where a better instance of the class has much the same mask (`soft_nms_sigma`; 0 leaves Mask2Former's scores);
        one query may appear for several classes. At most `max_instances`, by default 100, or as many as there are queries
        where these are more. Masks may overlap, and are whole but for parts far away (`max_part_gap`; None: they stay, too);
        a box is the tight box of its mask. Mask logits are resized twice, as by Mask2Former: to the input, of which the image's
        part is taken, and to the original image.

        As transformers' processors have it: `target_sizes` stands for `original_sizes`, the input sizes then follow from the
        configured size, and every result also has `segmentation` (H, W) with one instance a pixel, the best (-1: none), and
        `segments_info`, a record per id of it, without those of whose mask less than `overlap_mask_area_threshold` is seen.
        """
        originals, inputs = self._geometry(outputs, original_sizes if target_sizes is None else target_sizes, input_sizes)
        options = {"threshold": threshold, "mask_threshold": mask_threshold, "max_instances": max_instances}
        results = []
        for size, found in zip(originals, self.post_process_crops(outputs, originals, inputs, **options), strict=True):
            segmentation, records = label_map(found, size, overlap_mask_area_threshold)
            results.append(
                {
                    **{name: found[name] for name in ("scores", "labels", "boxes")},
                    "masks": full_masks(found, size),
                    "segmentation": segmentation,
                    "segments_info": records,
                }
            )
        return results

    @torch.no_grad()
    def post_process_crops(
        self,
        outputs: ModelOutput,
        original_sizes: Sizes,
        input_sizes: Sizes | None = None,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        max_instances: int | None = None,
    ) -> list[dict[str, Any]]:
        """The same instances without a mask of the image's size: instead of `masks`, per instance the mask inside its box,
        `crops` (width, height) bool, column by column, and in `corners` (n, 2) the column and row of its first pixel."""
        class_logits, mask_logits = outputs.class_queries_logits, outputs.masks_queries_logits
        originals, inputs = self._geometry(outputs, original_sizes, input_sizes)
        return [
            image_instances(
                class_logits[index].float(),
                mask_logits[index].float(),
                ImageGeometry(originals[index], inputs[index], self.mask_stride),
                threshold=threshold,
                mask_threshold=mask_threshold,
                max_instances=max(100, mask_logits.shape[1]) if max_instances is None else max_instances,
                soft_nms_sigma=self.soft_nms_sigma,
                max_part_gap=self.max_part_gap,
            )
            for index in range(len(mask_logits))
        ]

    def _geometry(
        self, outputs: ModelOutput, original_sizes: Sizes | None, input_sizes: Sizes | None
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        batch_size = len(outputs.masks_queries_logits)
        if original_sizes is None:
            raise ValueError("the (height, width) of each image is needed: give `original_sizes` or `target_sizes`")
        originals = _sizes("original_sizes", original_sizes, batch_size)
        if input_sizes is None:
            return originals, [self.resized_size(*size) if self.do_resize else size for size in originals]
        return originals, _sizes("input_sizes", input_sizes, batch_size)


def _resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    if size.height and size.width:
        return size.height, size.width
    scales = []
    if size.longest_edge:
        scales.append(size.longest_edge / max(height, width))
    if size.shortest_edge:
        scales.append(size.shortest_edge / min(height, width))
    if not scales:
        raise ValueError(f"size must give 'longest_edge', 'shortest_edge' or 'height' and 'width', got {dict(size)}")
    scale = min(scales)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright (EXIF), more than 8 bits scaled to 8, transparency on white: what training reads from the same file."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image), known_16_bits=image.mode.startswith("I;16")))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values_HW: np.ndarray, *, known_16_bits: bool) -> np.ndarray:
    """Pixels of an integer or float image as uint8; the largest value tells the range where the mode does not."""
    is_float = np.issubdtype(values_HW.dtype, np.floating)
    values_HW = np.nan_to_num(values_HW.astype(np.float64), nan=0.0, posinf=65535.0, neginf=0.0)
    largest = values_HW.max(initial=0.0)
    scale = 1.0
    if known_16_bits or largest > 255:
        scale = 1 / 257
    elif is_float and largest <= 1:
        scale = 255.0
    return np.rint(values_HW * scale).clip(0, 255).astype(np.uint8)


def _round_up(length: int, divisor: int) -> int:
    return -(-length // divisor) * divisor


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    return transforms.pad(image[None], [0, 0, width - image.shape[-1], height - image.shape[-2]])[0]


def _sizes(name: str, sizes: Sizes, batch_size: int) -> list[tuple[int, int]]:
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    pairs = [(int(row[0]), int(row[1])) for row in rows]
    if len(pairs) != batch_size:
        raise ValueError(f"{name} must hold one (height, width) per image ({batch_size}), got {len(pairs)}")
    return pairs
