import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sim_hf.data.augmentation import EvalTransform, TrainTransform, jitter_colors, read_sample
from sim_hf.data.masks import encode_rle

COLORS = [(220, 20, 20), (20, 20, 220), (20, 160, 20)]
NO_COLOR = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def _row(boxes_xywh, size=(120, 80), *, crowd=None, with_masks=False, image_id=7):
    """A white picture (width, height) with one coloured square per box."""
    image = Image.new("RGB", size, "white")
    objects = {
        "id": [100 + k for k in range(len(boxes_xywh))],
        "bbox": [list(map(float, box)) for box in boxes_xywh],
        "category": list(range(len(boxes_xywh))),
        "iscrowd": crowd or [False] * len(boxes_xywh),
    }
    for k, (x, y, w, h) in enumerate(boxes_xywh):
        image.paste(COLORS[k], (x, y, x + w, y + h))
    if with_masks:
        objects["segmentation"] = []
        for x, y, w, h in boxes_xywh:
            mask = np.zeros(size[::-1], bool)
            mask[y : y + h, x : x + w] = True
            objects["segmentation"].append(json.dumps(encode_rle(mask)))
    return {"image": image, "image_id": image_id, "width": size[0], "height": size[1], "objects": objects}


def _pixels_of_color(image_3hw, label):
    """Where the pixels are nearest to the label's colour: the truth, from the pixels alone."""
    palette = torch.tensor([*COLORS, (255, 255, 255)]).float()
    return (image_3hw.permute(1, 2, 0).float()[:, :, None] - palette).norm(dim=-1).argmin(-1) == label


def _box_of_color(image_3hw, label):
    rows, columns = torch.nonzero(_pixels_of_color(image_3hw, label), as_tuple=True)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def _assert_boxes_lie_on_their_squares(sample, tolerance=1.0):
    for box, label in zip(sample["boxes"], sample["class_labels"].tolist(), strict=True):
        assert torch.allclose(box, _box_of_color(sample["image"], label), atol=tolerance)


BOXES = [(10, 8, 30, 24), (70, 40, 36, 28)]


@pytest.mark.parametrize("seed", range(25))
def test_boxes_stay_on_their_squares_through_scale_crop_and_flip(seed):
    sample = TrainTransform(96, **NO_COLOR)(_row(BOXES), seed=seed)
    assert len(sample["boxes"]) >= 1
    assert max(sample["image"].shape) <= 96
    _assert_boxes_lie_on_their_squares(sample)


def test_flip_mirrors_boxes_exactly():
    sample = TrainTransform(120, scale_range=(1, 1), flip=1, **NO_COLOR)(_row(BOXES), seed=0)
    assert sample["boxes"].tolist() == [[80, 8, 110, 32], [14, 40, 50, 68]]
    _assert_boxes_lie_on_their_squares(sample, tolerance=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_made_on_the_upright_picture_fit_all_exif_orientations(orientation):
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposition that EXIF will undo
    row = _row(BOXES)
    image = row["image"] if orientation == 1 else row["image"].transpose(Image.Transpose(stored[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    row["image"] = {"bytes": buffer.getvalue(), "path": None}
    sample = EvalTransform(120)(row)
    assert sample["orig_size"] == (80, 120)
    assert sample["boxes"].tolist() == [[10, 8, 40, 32], [70, 40, 106, 68]]
    _assert_boxes_lie_on_their_squares(sample, tolerance=0)


def test_swapped_width_and_height_are_explained_by_exif():
    row = _row(BOXES) | {"width": 80, "height": 120}
    with pytest.raises(ValueError, match=r"image 7 is 120 x 80.*80 x 120.*EXIF"):
        EvalTransform(64)(row)


def test_other_size_than_annotated_is_an_error():
    with pytest.raises(ValueError, match="wrong place"):
        EvalTransform(64)(_row(BOXES) | {"width": 240, "height": 160})


def test_row_without_size_is_accepted():
    row = _row(BOXES)
    del row["width"], row["height"]
    assert len(EvalTransform(64)(row)["boxes"]) == 2


def test_eval_keeps_the_aspect_ratio_and_scales_the_boxes():
    sample = EvalTransform(60)(_row(BOXES))
    assert sample["image"].shape == (3, 40, 60) and sample["image"].dtype == torch.uint8
    assert sample["boxes"].tolist() == [[5, 4, 20, 16], [35, 20, 53, 34]]
    assert sample["orig_size"] == (80, 120) and sample["image_id"] == 7
    assert sample["class_labels"].tolist() == [0, 1] and sample["has_mask"].tolist() == [False, False]
    assert "masks" not in sample


def test_eval_shortest_side_is_limited_by_the_longest():
    assert EvalTransform(1000, 40)(_row([]))["image"].shape == (3, 40, 60)
    assert EvalTransform(50, 40)(_row([]))["image"].shape == (3, 33, 50)


def test_same_seed_same_sample_and_other_seed_another():
    transform = TrainTransform(96)
    first, again, other = (transform(_row(BOXES), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["boxes"], again["boxes"])
    assert first["image"].shape != other["image"].shape or not torch.equal(first["image"], other["image"])


def test_sample_with_seed_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    TrainTransform(96)(_row(BOXES), seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_crop_never_loses_the_only_object_and_never_cuts_it_when_it_can_be_avoided():
    row = _row([(112, 72, 6, 6)])
    for seed in range(40):
        sample = TrainTransform(64, scale_range=(2, 2), flip=0, **NO_COLOR)(row, seed=seed)
        assert len(sample["boxes"]) == 1
        _assert_boxes_lie_on_their_squares(sample)


def test_object_with_little_left_is_dropped_and_half_of_one_keeps_the_clipped_box():
    transform = TrainTransform(60, scale_range=(1, 1), **NO_COLOR)
    sample = read_sample(_row([(0, 0, 40, 20), (50, 30, 40, 20)], size=(100, 60)))
    half = transform._cropped(sample, 0, 20, 60, 60)
    assert half.boxes_n4.tolist() == [[0, 0, 20, 20], [30, 30, 60, 50]]
    little = transform._cropped(sample, 0, 30, 60, 60)
    assert little.boxes_n4.tolist() == [[20, 30, 60, 50]], "a quarter of the first object is less than min_visible"


def test_cropped_mask_gives_the_tight_box_where_clipping_would_be_too_large():
    row = _row([(0, 0, 100, 100)], size=(100, 100))
    triangle = np.tri(100, dtype=bool)  # lower left half: right of column 40, rows above 40 are empty
    row["objects"]["segmentation"] = [json.dumps(encode_rle(triangle))]
    sample = read_sample(row, with_masks=True)
    cropped = TrainTransform(60, with_masks=True)._cropped(sample, 0, 40, 100, 60)
    assert cropped.boxes_n4.tolist() == [[0, 40, 60, 100]]
    assert torch.equal(cropped.masks_nhw[0], torch.from_numpy(triangle[:, 40:]))


@pytest.mark.parametrize("seed", range(10))
def test_masks_stay_on_their_squares(seed):
    sample = TrainTransform(96, with_masks=True, **NO_COLOR)(_row(BOXES, with_masks=True), seed=seed)
    assert sample["masks"].shape[1:] == sample["image"].shape[1:] and sample["masks"].dtype == torch.bool
    assert sample["has_mask"].all()
    for mask, label in zip(sample["masks"], sample["class_labels"].tolist(), strict=True):
        assert (mask != _pixels_of_color(sample["image"], label)).float().mean() < 0.01


def test_object_without_segmentation_has_no_mask():
    row = _row(BOXES, with_masks=True)
    row["objects"]["segmentation"][1] = ""
    sample = EvalTransform(60, with_masks=True)(row)
    assert sample["has_mask"].tolist() == [True, False] and not sample["masks"][1].any()


def test_masks_without_segmentations_in_the_data_are_an_error():
    with pytest.raises(ValueError, match=r"no `objects\.segmentation`"):
        EvalTransform(60, with_masks=True)(_row(BOXES))


def test_crowds_and_boxes_without_area_are_left_out():
    row = _row([*BOXES, (3, 3, 9, 9)], crowd=[False, True, False])
    row["objects"]["bbox"][2] = [3.0, 3.0, 0.0, 9.0]
    for transform in (EvalTransform(120), TrainTransform(120, scale_range=(1, 1))):
        assert transform(row, seed=0)["class_labels"].tolist() == [0]


def test_boxes_are_clipped_to_the_picture_and_those_outside_are_left_out():
    row = _row(BOXES)
    row["objects"]["bbox"] = [[100.0, 60.0, 50.0, 50.0], [130.0, 10.0, 5.0, 5.0]]
    assert EvalTransform(120)(row)["boxes"].tolist() == [[100, 60, 120, 80]]


def test_box_that_is_not_finite_is_an_error_with_the_image_id():
    row = _row(BOXES)
    row["objects"]["bbox"][0][0] = float("nan")
    with pytest.raises(ValueError, match="image 7"):
        EvalTransform(120)(row)


@pytest.mark.parametrize("transform", [TrainTransform(64, with_masks=True), EvalTransform(64, with_masks=True)])
def test_image_without_objects_has_empty_labels(transform):
    sample = transform(_row([], with_masks=True), seed=0)
    assert sample["boxes"].shape == (0, 4) and sample["class_labels"].shape == (0,)
    assert sample["class_labels"].dtype == torch.long
    assert sample["masks"].shape == (0, *sample["image"].shape[1:])


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
def test_degenerate_picture_sizes_survive(size):
    for seed in range(5):
        image = TrainTransform(32)(_row([], size=size), seed=seed)["image"]
        assert min(image.shape[1:]) >= 1 and max(image.shape[1:]) <= 32


def test_boxes_smaller_than_two_pixels_are_dropped_in_training_only():
    row = _row([(10, 10, 4, 4)], size=(400, 400))
    assert len(TrainTransform(100, scale_range=(1, 1))(row, seed=0)["boxes"]) == 0
    assert len(EvalTransform(100)(row)["boxes"]) == 1


def test_neutral_color_jitter_changes_nothing():
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    assert torch.equal(jitter_colors(image, brightness=1, contrast=1, saturation=1, hue=0), image)


def test_color_jitter_does_what_its_words_say():
    red_and_gray = torch.tensor([[200, 100], [60, 100], [60, 100]], dtype=torch.uint8)[:, None]
    bright = jitter_colors(red_and_gray, brightness=1.2, contrast=1, saturation=1, hue=0)
    assert bright[:, 0].T.tolist() == [[240, 72, 72], [120, 120, 120]]
    gray = jitter_colors(red_and_gray, brightness=1, contrast=1, saturation=0, hue=0)
    assert gray[:, 0].T.tolist() == [[102, 102, 102], [100, 100, 100]]  # 0.299 * 200 + 0.701 * 60 = 101.9
    flat = jitter_colors(red_and_gray, brightness=1, contrast=0, saturation=1, hue=0)
    assert flat.unique().tolist() == [101]
    turned = jitter_colors(red_and_gray, brightness=1, contrast=1, saturation=1, hue=1 / 3)[:, 0]
    assert turned[:, 0].argmax() != 0 and turned[:, 1].tolist() == [100, 100, 100]


@pytest.mark.parametrize(
    "build",
    [
        lambda: TrainTransform(0),
        lambda: TrainTransform(64, scale_range=(0, 1)),
        lambda: TrainTransform(64, scale_range=(2, 1)),
        lambda: TrainTransform(64, flip=1.5),
        lambda: EvalTransform(64, 65),
    ],
)
def test_impossible_settings_are_refused(build):
    with pytest.raises(ValueError, match=r"must be|expected"):
        build()
