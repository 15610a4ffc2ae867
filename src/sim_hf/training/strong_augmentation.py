"""Strong colours for the student alone: the teacher looks at the image as it is (BoxTeacher, arXiv 2210.05174, Sec. 3.3).

Only colours and sharpness change, so that boxes, pseudo masks and colour affinities of the image hold for both networks.
Shape letters: B images, H and W input rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from sim_hf.mask_generation.copy_paste import step_generator

COLOR_RANGE = (0.6, 1.4)  # factors of brightness, contrast and saturation
GRAY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_RANGE = (0.1, 2.0)  # deviation of the Gaussian, input pixels
_BLUR_SIZE = 9


@torch.no_grad()
def strongly_augmented(
    images_BCHW: Tensor, pixel_mask_BHW: Tensor, *, probability: float, seed: int, step: int, image_keys: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """RGB in 0..1 -> the images, that share of them in other colours, and which pixels were changed (B, 1, H, W).

    What happens to an image depends on (seed, step, its key) only: the padding is neither read nor changed.
    """
    heights, widths = (pixel_mask_BHW.amax(axis).sum(1).tolist() for axis in (2, 1))
    strong_BCHW, changed_B1HW = images_BCHW.clone(), torch.zeros_like(images_BCHW[:, :1], dtype=torch.bool)
    for image, key in enumerate(image_keys):
        generator = step_generator(seed, step, key, purpose="strong augmentation")
        share, gray, blur, *factors, sigma = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        if share >= probability:
            continue
        place = (image, slice(None), slice(int(heights[image])), slice(int(widths[image])))
        brightness, contrast, saturation = (_between(COLOR_RANGE, factor) for factor in factors)
        view_CHW = functional.adjust_brightness(images_BCHW[place], brightness)
        view_CHW = functional.adjust_contrast(view_CHW, contrast)
        view_CHW = functional.adjust_saturation(view_CHW, 0.0 if gray < GRAY_PROBABILITY else saturation)
        if blur < BLUR_PROBABILITY and min(view_CHW.shape[-2:]) > _BLUR_SIZE // 2:
            view_CHW = functional.gaussian_blur(view_CHW, [_BLUR_SIZE, _BLUR_SIZE], [_between(BLUR_RANGE, sigma)] * 2)
        strong_BCHW[place], changed_B1HW[place] = view_CHW, True
    return strong_BCHW, changed_B1HW


def _between(limits: tuple[float, float], share: float) -> float:
    low, high = limits
    return low + (high - low) * share
