"""Four images on one canvas: every picture is white with one rectangle in a colour of its own, so pixels tell the truth."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from factories import tiny_processor
from sim_hf.data.augmentation import TrainTransform
from sim_hf.data.collator import DetectionCollator
from sim_hf.data.masks import encode_rle
from sim_hf.data.mosaic import MosaicDataset, _quadrants
from sim_hf.data.sampler import SeededDataset, StepSampler, sample_seed
from sim_hf.training.arguments import DataArguments, parse_arguments
from sim_hf.training.loaders import epoch_loader

SIZE = 96
BACKGROUND = (90, 90, 90)
COLORS = [(220, 0, 0), (0, 0, 220), (0, 160, 0), (200, 0, 200), (0, 170, 170), (0, 0, 0)]
SIZES = [(120, 80), (60, 90), (100, 100), (160, 60), (40, 44), (77, 131)]  # (width, height)
SAME_COLORS = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def _row(index, *, empty=False):
    width, height = SIZES[index]
    image, mask = Image.new("RGB", (width, height), "white"), np.zeros((height, width), bool)
    x, y, w, h = width // 5, height // 4, width // 2, height // 3
    objects = {"bbox": [], "category": [], "iscrowd": [], "segmentation": []}
    if not empty:
        image.paste(COLORS[index], (x, y, x + w, y + h))
        mask[y : y + h, x : x + w] = True
        segmentation = json.dumps(encode_rle(mask))
        objects = {"bbox": [[x, y, w, h]], "category": [index], "iscrowd": [False], "segmentation": [segmentation]}
    return {"image": image, "image_id": 100 + index, "width": width, "height": height, "objects": objects}


ROWS = [_row(index) for index in range(len(SIZES))]


def _mosaics(rows=ROWS, *, probability=1.0, seed=0, **options):
    transform = TrainTransform(SIZE, **{"with_masks": True, **SAME_COLORS, **options})
    return MosaicDataset(rows, transform, seed, probability=probability, background=BACKGROUND)


def _is_mosaic(sample):
    return len(sample["boxes"]) > 1


def _assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]


def _pixels_of(sample, label):
    """Where the pixels have the label's colour, give or take what resizing mixes in: no mixture comes near another label's."""
    return (sample["image"].permute(1, 2, 0).float() - torch.tensor(COLORS[label])).norm(dim=-1) < 100


def _extent(mask_ss):
    rows, columns = mask_ss.nonzero(as_tuple=True)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def _unique_objects(sample):
    """(row, label) of the objects that are on the canvas once: an image may be drawn for several quadrants."""
    labels = sample["class_labels"].tolist()
    return [(n, label) for n, label in enumerate(labels) if labels.count(label) == 1]


@pytest.mark.parametrize("flip", [0, 1])
def test_boxes_and_masks_lie_where_the_pixels_of_their_objects_are(flip):
    mosaics, num_checked = _mosaics(flip=flip), 0
    for key in [(epoch, index) for epoch in range(6) for index in range(len(ROWS))]:
        sample = mosaics[key]
        for n, label in _unique_objects(sample):
            pixels_ss = _pixels_of(sample, label)
            assert torch.allclose(sample["boxes"][n], _extent(pixels_ss), atol=1.5)
            assert torch.allclose(sample["boxes"][n], _extent(sample["masks"][n]), atol=1.5)
            assert sample["masks"][n][pixels_ss].float().mean() > 0.95
            num_checked += 1
    assert num_checked > 50


def test_all_four_objects_are_there_when_nothing_can_be_lost():
    """Each object covers a sixth of its picture, so none falls below the smallest visible share or size."""
    assert {len(_mosaics()[epoch, 0]["boxes"]) for epoch in range(20)} == {4}


def test_a_mosaic_has_the_keys_the_types_and_the_canvas_of_a_sample():
    sample, plain = _mosaics()[0], SeededDataset(ROWS, TrainTransform(SIZE, with_masks=True))[0]
    assert sample.keys() == plain.keys()
    for name in ("image", "boxes", "class_labels", "has_mask", "masks"):
        assert sample[name].dtype == plain[name].dtype
    assert sample["image"].shape == (3, SIZE, SIZE) and sample["masks"].shape[1:] == (SIZE, SIZE)
    assert len(sample["boxes"]) == len(sample["class_labels"]) == len(sample["has_mask"]) == len(sample["masks"])


def test_without_masks_there_are_none():
    assert "masks" not in _mosaics(with_masks=False)[0]


@pytest.mark.parametrize("size", [2, 3, 64, 97])
def test_the_quadrants_cover_every_pixel_of_the_canvas_once(size):
    for seed in range(20):
        count_ss = torch.zeros(size, size, dtype=torch.int)
        for top, left, height, width in _quadrants(size, torch.Generator().manual_seed(seed)):
            count_ss[top : top + height, left : left + width] += 1
        assert (count_ss == 1).all()


def test_the_canvas_is_divided_near_its_middle():
    heights = [_quadrants(100, torch.Generator().manual_seed(seed))[0][2] for seed in range(200)]
    assert 35 <= min(heights) < 40 and 60 < max(heights) <= 65


def test_boxes_lie_inside_the_canvas_and_are_not_smaller_than_the_smallest_size():
    for epoch in range(10):
        boxes_n4 = _mosaics(min_box_size=8)[epoch, epoch % len(ROWS)]["boxes"]
        assert (boxes_n4 >= 0).all() and (boxes_n4 <= SIZE).all()
        assert (boxes_n4[:, 2:] - boxes_n4[:, :2] >= 8).all()


def test_a_canvas_is_filled_for_the_most_part_and_shows_the_background_elsewhere():
    background_311 = torch.tensor(BACKGROUND, dtype=torch.uint8)[:, None, None]
    shares = [float((_mosaics()[epoch, 0]["image"] == background_311).all(0).float().mean()) for epoch in range(40)]
    assert 0.05 < np.mean(shares) < 0.35


def test_a_mosaic_holds_the_image_of_its_index_and_carries_its_id_and_size():
    for index, (width, height) in enumerate(SIZES):
        for epoch in range(5):
            sample = _mosaics()[epoch, index]
            assert index in sample["class_labels"].tolist()
            assert (sample["image_id"], sample["orig_size"]) == (100 + index, (height, width))


def test_the_image_of_the_index_may_be_in_any_quadrant():
    """Objects come quadrant by quadrant."""
    samples = [_mosaics()[epoch, 0] for epoch in range(60)]
    assert {n for sample in samples for n, label in _unique_objects(sample) if label == 0} == {0, 1, 2, 3}


def test_the_other_images_come_from_the_whole_data_set():
    labels = {label for epoch in range(40) for label in _mosaics()[epoch, 0]["class_labels"].tolist()}
    assert labels == set(range(len(ROWS)))


def test_a_mosaic_is_a_function_of_seed_epoch_and_index():
    sample = _mosaics()[3, 1]
    torch.rand(5)
    state = torch.get_rng_state()
    _assert_same(sample, _mosaics()[3, 1])
    assert torch.equal(state, torch.get_rng_state())
    for other in (_mosaics()[4, 1], _mosaics(seed=1)[3, 1], _mosaics()[3, 2]):
        assert not torch.equal(sample["image"], other["image"])


def _stream(num_workers, count=6):
    loader = DataLoader(
        _mosaics(probability=0.5), batch_sampler=StepSampler(len(ROWS), 2, seed=5), num_workers=num_workers,
        collate_fn=DetectionCollator((0.5,) * 3, (0.2,) * 3, pad_to=SIZE),
        multiprocessing_context="fork" if num_workers else None, timeout=30 if num_workers else 0,
    )  # fmt: skip
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def test_workers_do_not_change_the_mosaics():
    for alone, helped in zip(_stream(0), _stream(2), strict=True):
        assert torch.equal(alone["pixel_values"], helped["pixel_values"])
        for first, second in zip(alone["labels"], helped["labels"], strict=True):
            _assert_same(first, second)


def test_every_epoch_still_covers_every_image():
    batches = _stream(0, count=6)  # two epochs of three batches of two
    for epoch in (batches[:3], batches[3:]):
        assert sorted(int(label["image_id"]) for batch in epoch for label in batch["labels"]) == [100 + k for k in range(6)]


def test_samples_that_are_no_mosaics_are_the_plain_ones():
    plain = SeededDataset(ROWS, TrainTransform(SIZE, with_masks=True, **SAME_COLORS))
    for index in range(len(ROWS)):
        _assert_same(_mosaics(probability=0)[2, index], plain[2, index])
    mixed = [(_mosaics(probability=0.5)[epoch, 0], plain[epoch, 0]) for epoch in range(80)]
    unchanged = [(sample, expected) for sample, expected in mixed if not _is_mosaic(sample)]
    assert 25 < len(unchanged) < 55
    for sample, expected in unchanged:
        _assert_same(sample, expected)


def test_which_samples_become_mosaics_has_nothing_to_do_with_their_scale():
    """Deciding by the first number of the sample's seed, which is the scale, would leave large scales only."""
    epochs = [epoch for epoch in range(400) if not _is_mosaic(_mosaics(probability=0.5)[epoch, 4])]
    scales = [float(torch.rand((), generator=torch.Generator().manual_seed(sample_seed(0, epoch, 4)))) for epoch in epochs]
    assert abs(np.mean(scales) - 0.5) < 0.1


def test_images_without_objects_make_a_mosaic_without_objects():
    sample = _mosaics([_row(index, empty=True) for index in range(3)])[0]
    assert sample["boxes"].shape == (0, 4) and sample["class_labels"].shape == (0,) and sample["has_mask"].shape == (0,)
    assert sample["class_labels"].dtype == torch.long and sample["masks"].shape == (0, SIZE, SIZE)


def test_an_image_without_objects_keeps_its_quadrant_among_others():
    rows = [_row(0, empty=True), *ROWS[1:]]
    sample = _mosaics(rows)[0]
    assert sample["image_id"] == 100 and 0 not in sample["class_labels"].tolist()
    assert 1 <= len(sample["boxes"]) <= 3


def test_a_data_set_of_one_image_gives_four_views_of_it():
    sample = _mosaics(ROWS[:1])[0]
    assert sample["class_labels"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (900, 3)])
def test_degenerate_picture_sizes_survive(size):
    objects = {"bbox": [], "category": [], "iscrowd": []}
    rows = [{"image": Image.new("RGB", size), "image_id": 1, "objects": objects}]
    assert _mosaics(rows, with_masks=False)[0]["image"].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_an_impossible_probability_is_refused(probability):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        _mosaics(probability=probability)
    with pytest.raises(ValueError, match=r"--mosaic must be a probability in 0\.\.1"):
        parse_arguments(["--data", "folder", "--mosaic", str(probability)])


def _loader(rows, **options):
    return epoch_loader(rows, DataArguments(**options), tiny_processor(), with_masks=False, batch_size=2, num_micro=1, seed=0)


def test_the_loader_makes_mosaics_on_the_mean_colour_of_its_processor():
    processor, loader = tiny_processor(), _loader(ROWS, mosaic=0.5)
    assert isinstance(loader.dataset, MosaicDataset) and loader.dataset.probability == 0.5
    assert loader.dataset.background == tuple(round(255 * mean) for mean in processor.image_mean)
    assert not isinstance(_loader(ROWS).dataset, MosaicDataset)


def test_a_streamed_data_set_has_no_mosaics():
    from datasets import Dataset

    rows = Dataset.from_dict({"image_id": [1, 2]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"--mosaic 0\.5 .* --streaming"):
        _loader(rows, mosaic=0.5)
    _loader(rows, mosaic=0.0)
