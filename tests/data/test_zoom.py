"""Windows around one object, and the samples that they become."""

import numpy as np
import pytest
import torch
from PIL import Image

from sim_hf.data import TrainTransform
from sim_hf.data.zoom import object_window

SIZE = (200, 300)  # height, width
BOX = (40, 60, 20, 30)  # xywh


def _window(boxes, seed, *, size=128, image_size=SIZE):
    return object_window(torch.tensor(boxes, dtype=torch.float32), image_size, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(30))
def test_window_lies_in_the_picture_holds_the_whole_object_and_its_sides_are_as_the_share_says(seed):
    top, left, height, width = _window([[40, 60, 60, 90]], seed)
    assert top >= 0 and left >= 0 and top + height <= 200 and left + width <= 300
    assert left <= 40 and left + width >= 60 and top <= 60 and top + height >= 90
    assert 30 <= max(height, width) <= 30 / 0.3 + 2


def test_window_of_an_object_larger_than_its_share_is_the_picture():
    assert all(_window([[0, 0, 300, 200]], seed) == (0, 0, 200, 300) for seed in range(10))


def test_one_pixel_box_is_enlarged_eight_times_at_most():
    top, left, height, width = _window([[150, 100, 151, 101]], 0)
    assert (height, width) == (17, 17) and left <= 150 < left + width and top <= 100 < top + height


def test_box_in_the_corner_is_cut_at_the_border():
    top, left, height, width = _window([[290, 190, 300, 200]], 1)
    assert top + height == 200 and left + width == 300


def test_no_object_no_window():
    assert _window(np.zeros((0, 4)), 0) is None


def test_windows_choose_all_objects():
    boxes = [[0, 0, 20, 20], [200, 150, 220, 170]]
    assert {_window(boxes, seed)[1] < 100 for seed in range(20)} == {True, False}


def _row(boxes):
    picture = np.zeros((*SIZE, 3), dtype=np.uint8)
    for x, y, w, h in boxes:
        picture[y : y + h, x : x + w] = 255
    objects = {"bbox": boxes, "category": [0] * len(boxes)}
    return {"image": Image.fromarray(picture), "image_id": 1, "objects": objects}


@pytest.mark.parametrize("seed", range(5))
def test_zoomed_sample_is_large_and_its_box_lies_on_its_pixels(seed):
    sample = TrainTransform(128, zoom=1.0, brightness=0, contrast=0, saturation=0, hue=0)(_row([BOX]), seed=seed)
    (box,) = sample["boxes"].tolist()
    assert max(box[2] - box[0], box[3] - box[1]) >= 0.29 * 128, "12 pixels without zoom"
    rows, columns = torch.nonzero(sample["image"][0] > 127).unbind(-1)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert torch.tensor(seen) == pytest.approx(torch.tensor(box), abs=1.0)


def test_zoom_of_an_image_without_objects_is_the_ordinary_sample_of_a_scale():
    sample = TrainTransform(64, zoom=1.0)(_row([]), seed=0)
    assert sample["boxes"].shape == (0, 4) and max(sample["image"].shape[1:]) <= 64


def test_without_zoom_samples_are_what_they_were():
    plain, none = (TrainTransform(64, **options)(_row([BOX]), seed=3) for options in ({}, {"zoom": 0.0}))
    assert torch.equal(plain["image"], none["image"]) and torch.equal(plain["boxes"], none["boxes"])


def test_zoom_must_be_a_probability():
    with pytest.raises(ValueError, match="zoom"):
        TrainTransform(64, zoom=1.5)
