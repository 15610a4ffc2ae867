import numpy as np
import pytest
import torch

from sim_hf.data.cropped_masks import CroppedMasks
from sim_hf.data.masks import encode_crop, encode_rle
from sim_hf.evaluation import to_coco_results


def _crop(mask_HW):
    """-> the inside of the mask's box, column by column, and its first column and row."""
    rows, columns = mask_HW.any(1).nonzero()[:, 0], mask_HW.any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])
    return mask_HW[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].T, (left, top)


@pytest.fixture
def masks():
    """Noise, full columns, the whole image, one pixel in each corner."""
    generator = torch.Generator().manual_seed(0)
    masks_nHW = torch.zeros(8, 12, 9, dtype=torch.bool)
    masks_nHW[0] = torch.rand(12, 9, generator=generator) > 0.5
    masks_nHW[1, 3:7, 2:6] = torch.rand(4, 4, generator=generator) > 0.4
    masks_nHW[2, :, 4:7] = True
    masks_nHW[3] = True
    for k, (row, column) in enumerate([(0, 0), (0, 8), (11, 0), (11, 8)], start=4):
        masks_nHW[k, row, column] = True
    return masks_nHW


@pytest.fixture
def cropped(masks):
    crops, corners = zip(*map(_crop, masks), strict=True)
    return CroppedMasks(list(crops), torch.tensor(corners), (12, 9))


def test_it_reads_like_the_full_masks(masks, cropped):
    assert len(cropped) == len(masks)
    assert torch.equal(torch.stack(list(cropped)), masks)
    chosen = torch.tensor([True, False] * 4)
    assert torch.equal(torch.stack(list(cropped[chosen])), masks[chosen])
    rows = torch.tensor([3, 0, 0])
    assert torch.equal(torch.stack(list(cropped[rows])), masks[rows])
    assert torch.equal(cropped[torch.tensor(2)], masks[2]) and torch.equal(cropped[-1], masks[-1])
    assert len(cropped[torch.zeros(8, dtype=torch.bool)]) == 0


def test_run_lengths_are_those_of_the_full_masks(masks, cropped):
    assert cropped.run_lengths() == [encode_rle(mask) for mask in masks.numpy()]


def test_a_crop_with_background_around_it_gives_the_same_run_lengths():
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width = random.integers(1, 12, 2).tolist()
        mask_HW = np.zeros((height, width), dtype=bool)
        top, left = int(random.integers(height)), int(random.integers(width))
        bottom, right = int(random.integers(top, height)) + 1, int(random.integers(left, width)) + 1
        mask_HW[top:bottom, left:right] = random.uniform(size=(bottom - top, right - left)) < random.choice([0, 0.2, 0.7, 1])
        assert encode_crop(mask_HW[top:bottom, left:right].T, left, top, (height, width)) == encode_rle(mask_HW.astype(np.uint8))


def test_coco_results_are_those_of_the_full_masks(masks, cropped):
    result = {"scores": torch.linspace(0.9, 0.2, 8), "labels": torch.arange(8) % 2}
    ours = to_coco_results(3, {**result, "masks": cropped}, [7, 9])
    assert ours == to_coco_results(3, {**result, "masks": masks}, [7, 9])
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0), "masks": CroppedMasks([], torch.zeros(0, 2), (12, 9))}
    assert to_coco_results(3, nothing, [7, 9]) == []


def test_corners_must_fit_the_crops(cropped):
    with pytest.raises(ValueError, match="a corner for each of 8 crops"):
        CroppedMasks(cropped.crops, cropped.corners_n2[:3], (12, 9))
