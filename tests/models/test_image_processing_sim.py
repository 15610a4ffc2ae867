"""Images in, instances out: sizes, padding, and masks that land exactly where they were predicted."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sim_hf.models.sim import PRESETS, SIMImageProcessor
from sim_hf.models.sim.image_processing_sim import PRESET_SIZES
from sim_hf.models.sim.instance_postprocessing import mask_overlap, soft_nms


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def outputs_for(masks_per_image, labels_per_image, num_classes=3, grid=None):
    """Predictions as the network makes them: one query per mask, confident, and one that says "no object"."""
    num_queries = max(len(masks) for masks in masks_per_image) + 1
    batch = len(masks_per_image)
    class_logits = torch.full((batch, num_queries, num_classes + 1), -10.0)
    class_logits[..., -1] = 10.0
    mask_logits = torch.full((batch, num_queries, *grid), -10.0)
    for image, (masks, labels) in enumerate(zip(masks_per_image, labels_per_image, strict=True)):
        for query, (mask, label) in enumerate(zip(masks, labels, strict=True)):
            class_logits[image, query, label], class_logits[image, query, -1] = 10.0, -10.0
            mask_logits[image, query] = mask
    return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)


def disc_logits(grid, center, radius, stride=4):
    """Signed distance to a disc given in input pixels, at the cell centres."""
    y = (torch.arange(grid[0]) + 0.5) * stride
    x = (torch.arange(grid[1]) + 0.5) * stride
    return radius - ((y[:, None] - center[0]) ** 2 + (x[None] - center[1]) ** 2).sqrt()


def disc(height, width, center, radius):
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    return (y[:, None] - center[0]) ** 2 + (x[None] - center[1]) ** 2 <= radius**2


def iou(one, other):
    return ((one & other).sum() / (one | other).sum()).item()


@pytest.mark.parametrize(
    ("size", "original", "resized"),
    [
        ({"longest_edge": 256}, (300, 200), (256, 171)),
        ({"longest_edge": 256}, (100, 220), (116, 256)),
        ({"longest_edge": 256}, (7, 2000), (1, 256)),
        ({"shortest_edge": 800, "longest_edge": 1333}, (480, 640), (800, 1067)),
        ({"shortest_edge": 800, "longest_edge": 1333}, (400, 1600), (333, 1333)),
        ({"height": 64, "width": 96}, (480, 640), (64, 96)),
    ],
)
def test_resizing_keeps_the_aspect_ratio_within_both_limits(size, original, resized):
    processor = SIMImageProcessor(size=size)
    assert processor.resized_size(*original) == resized
    inputs = processor(picture(*original), return_tensors="pt")
    assert inputs["input_sizes"].tolist() == [list(resized)]
    assert inputs["original_sizes"].tolist() == [list(original)]


def test_batch_is_normalised_and_padded_with_zeros_to_a_multiple_of_32():
    processor = SIMImageProcessor.from_preset("tiny", size={"longest_edge": 100})
    inputs = processor([picture(100, 40), Image.new("RGB", (100, 70), (255, 0, 128))], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 128, 128) and inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_mask"].shape == (2, 128, 128) and inputs["pixel_mask"].dtype == torch.int64
    assert inputs["input_sizes"].tolist() == [[100, 40], [70, 100]]
    assert inputs["pixel_mask"].sum((1, 2)).tolist() == [4000, 7000]
    assert (inputs["pixel_values"] * (1 - inputs["pixel_mask"][:, None]) == 0).all()
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(inputs["pixel_values"][1, :, 10, 10], torch.tensor(expected))


def test_arguments_of_a_call_override_the_processor():
    inputs = SIMImageProcessor.from_preset("tiny")(
        picture(50, 60), do_resize=False, do_normalize=False, size_divisor=64, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 64, 64) and inputs["input_sizes"].tolist() == [[50, 60]]
    assert inputs["pixel_values"].min() >= 0 and inputs["pixel_values"].max() <= 1


def test_without_padding_or_tensors_the_images_stay_a_list():
    processor = SIMImageProcessor.from_preset("tiny")
    inputs = processor([picture(50, 60), picture(60, 50)], do_pad=False)
    assert [tuple(image.shape) for image in inputs["pixel_values"]] == [(3, 213, 256), (3, 256, 213)]
    assert inputs["input_sizes"] == [(213, 256), (256, 213)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_image_comes_in_as_the_same_grey(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 40), 128 * 257, dtype=np.uint16))
    else:
        image = Image.new("RGB", (40, 40), (255,) * 3 if mode == "1" else (128,) * 3)
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    values = SIMImageProcessor.from_preset("tiny")(image, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert values[:, :, :256, :256].sub(1.0 if mode == "1" else 128 / 255).abs().max() < 0.02


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    values = SIMImageProcessor.from_preset("tiny")(image, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert values.min() == 1


def test_rotated_photographs_are_turned_upright():
    image = picture(30, 60)
    image.getexif()[0x0112] = 6
    assert SIMImageProcessor.from_preset("tiny")(image, return_tensors="pt")["original_sizes"].tolist() == [[60, 30]]


def test_pil_numpy_and_tensor_inputs_agree():
    processor, image = SIMImageProcessor.from_preset("tiny"), picture(50, 60)
    array = np.array(image)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    for same in (array, torch.from_numpy(array).permute(2, 0, 1), array.astype(np.uint16) * 257):
        torch.testing.assert_close(processor(same, return_tensors="pt")["pixel_values"], expected)


def test_every_preset_has_its_size_and_survives_saving(tmp_path):
    assert set(PRESET_SIZES) == set(PRESETS)
    for name, size in PRESET_SIZES.items():
        processor = SIMImageProcessor.from_preset(name)
        processor.save_pretrained(tmp_path)
        loaded = SIMImageProcessor.from_pretrained(tmp_path)
        assert dict(loaded.size) == size and loaded.size_divisor == 32 and loaded.mask_stride == 4
        assert loaded.soft_nms_sigma == 0.5 and loaded.max_part_gap == 0.25
    SIMImageProcessor(soft_nms_sigma=0, max_part_gap=None).save_pretrained(tmp_path)
    loaded = SIMImageProcessor.from_pretrained(tmp_path)
    assert loaded.soft_nms_sigma == 0 and loaded.max_part_gap is None
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        SIMImageProcessor.from_preset("huge")


def test_a_perfect_prediction_on_padded_images_has_iou_one():
    """Two images of different shapes: both are padded, and neither size is a multiple of the mask stride."""
    processor = SIMImageProcessor.from_preset("tiny", size={"longest_edge": 250})
    originals = [(300, 201), (97, 441)]
    inputs = processor([picture(*size) for size in originals], return_tensors="pt")
    grid = tuple(length // 4 for length in inputs["pixel_values"].shape[-2:])
    masks, expected = [], []
    for (height, width), (h, w) in zip(originals, inputs["input_sizes"].tolist(), strict=True):
        center, radius = (0.7 * h, 0.75 * w), 0.22 * min(h, w)
        masks.append([disc_logits(grid, center, radius)])
        y = ((torch.arange(height) + 0.5) * h / height)[:, None]
        x = ((torch.arange(width) + 0.5) * w / width)[None]
        expected.append((y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2)
    results = processor.post_process_instance_segmentation(
        outputs_for(masks, [[1], [2]], grid=grid), inputs["original_sizes"], inputs["input_sizes"]
    )
    for result, truth, label in zip(results, expected, (1, 2), strict=True):
        assert result["masks"].shape == (1, *truth.shape) and result["labels"].tolist() == [label]
        assert iou(result["masks"][0], truth) > 0.97


def test_a_mask_that_fills_the_image_fills_it_to_the_last_pixel():
    """Cells of the padding hold very negative logits; none of that may leak over the border."""
    processor = SIMImageProcessor.from_preset("tiny")
    for original, size in (((250, 130), (250, 130)), ((500, 260), (249, 129)), ((61, 33), (250, 131))):
        mask = torch.full((64, 64), -30.0)
        mask[: -(-size[0] // 4), : -(-size[1] // 4)] = 1.0
        (result,) = processor.post_process_instance_segmentation(
            outputs_for([[mask]], [[0]], grid=(64, 64)), [original], [size], mask_threshold=0.5
        )
        assert result["masks"].all() and result["boxes"].tolist() == [[0, 0, original[1], original[0]]]


SIZES = [((128, 96), (128, 96)), ((200, 333), (77, 128)), ((40, 31), (128, 99)), ((128, 61), (128, 128)), ((90, 90), (125, 9))]


def linear_resize(length, scale, count):
    """(length, count): the shares of `count` places in each of `length` outputs, by hand."""
    matrix = torch.zeros(length, count, dtype=torch.float64)
    for row in range(length):
        position = min(max((row + 0.5) * scale - 0.5, 0), count - 1)
        low = int(position)
        matrix[row, low] += 1 - (position - low)
        matrix[row, min(low + 1, count - 1)] += position - low
    return matrix


@pytest.mark.parametrize(("original", "size"), SIZES)
def test_masks_equal_two_bilinear_resizes_of_the_cropped_logits(original, size):
    """Slow reference: every pixel of both steps by hand, on noise, where nothing is smooth."""
    logits = torch.randn(1, 3, 32, 32)
    cells = [-(-length // 4) for length in size]
    outputs = outputs_for([[*logits[0]]], [[0, 1, 2]], grid=(32, 32))
    process = SIMImageProcessor(size_divisor=32, max_part_gap=None).post_process_instance_segmentation
    (result,) = process(outputs, [original], [size], threshold=0.0)
    axes = [
        linear_resize(length, input_length / length, input_length) @ linear_resize(input_length, 1 / 4, count)
        for length, input_length, count in zip(original, size, cells, strict=True)
    ]
    confident = result["scores"] > 0.4
    assert confident.sum() == 3
    for mask, label in zip(result["masks"][confident], result["labels"][confident], strict=True):
        reference = axes[0] @ logits[0, label, : cells[0], : cells[1]].double() @ axes[1].T
        certain = reference.abs() > 1e-4
        assert torch.equal(mask[certain], (reference > 0)[certain])


@pytest.mark.parametrize(("original", "size"), [*SIZES, ((61, 130), (253, 254))])
def test_no_pixel_differs_from_interpolating_the_whole_grid_twice(original, size):
    """With a grid whose padding repeats the image's last cells, torch's own resizing of all of it, float32."""
    coarse = torch.randn(1, 20, 9, 9, generator=torch.Generator().manual_seed(1))
    logits = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")
    rows, columns = (-(-length // 4) for length in size)
    logits[:, :, rows:] = logits[:, :, rows - 1 : rows]
    logits[..., columns:] = logits[..., columns - 1 : columns]
    outputs = outputs_for([[*logits[0]]], [[0] * 20], grid=(64, 64))
    process = SIMImageProcessor(soft_nms_sigma=0, max_part_gap=None).post_process_instance_segmentation
    (result,) = process(outputs, [original], [size], threshold=0.5, max_instances=20)
    assert len(result["masks"]) > 10
    padded = torch.nn.functional.interpolate(logits, (256, 256), mode="bilinear", align_corners=False)
    cut = padded[..., : size[0], : size[1]]
    whole = torch.nn.functional.interpolate(cut, original, mode="bilinear", align_corners=False)[0] > 0
    found = {mask.numpy().tobytes() for mask in result["masks"]}
    assert found <= {mask.numpy().tobytes() for mask in whole}


def test_crops_are_the_masks_inside_their_boxes():
    grid = (32, 32)
    masks = [disc_logits(grid, (50, 50), 30), disc_logits(grid, (70, 60), 25), torch.full(grid, -5.0), torch.full(grid, 5.0)]
    outputs = outputs_for([masks], [[0, 1, 2, 2]], grid=grid)
    outputs.class_queries_logits[0, 0, 1] = outputs.class_queries_logits[0, 0, 0] - 0.1  # one query, two classes
    processor = SIMImageProcessor()
    arguments = (outputs, [(200, 150)], [(125, 99)])
    (full,) = processor.post_process_instance_segmentation(*arguments, threshold=0.1)
    (found,) = processor.post_process_crops(*arguments, threshold=0.1)
    for name in ("scores", "labels", "boxes"):
        assert torch.equal(found[name], full[name])
    assert len(found["crops"]) == len(full["masks"]) == 4
    assert len({id(crop) for crop in found["crops"]}) == 3
    for crop, corner, mask, box in zip(found["crops"], found["corners"], full["masks"], full["boxes"].long(), strict=True):
        left, top, right, bottom = box.tolist()
        assert corner.tolist() == [left, top]
        assert torch.equal(crop.T, mask[top:bottom, left:right]) and mask.sum() == crop.sum()


def test_a_threshold_leaves_the_scores_of_the_rest_as_they_are():
    """Queries below it are not looked at."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.nn.functional.interpolate(torch.randn(1, 30, 5, 5, generator=generator), (32, 32), mode="bilinear")
    outputs = outputs_for([[*logits[0]]], [[0] * 30], grid=(32, 32))
    outputs.class_queries_logits = 2 * torch.randn(outputs.class_queries_logits.shape, generator=generator)
    process = SIMImageProcessor().post_process_instance_segmentation
    (everything,) = process(outputs, [(128, 128)], [(128, 128)], threshold=0.0, max_instances=90)
    (sure,) = process(outputs, [(128, 128)], [(128, 128)], threshold=0.45, max_instances=90)
    count = len(sure["scores"])
    assert 0 < count < 30 and everything["scores"][count] < 0.45
    for name in ("scores", "labels", "boxes", "masks"):
        assert torch.equal(sure[name], everything[name][:count])


def test_score_is_class_probability_times_mean_mask_probability():
    mask = torch.full((16, 16), -5.0)
    mask[:4, :4] = 0.0
    mask[:2, :4] = 2.0
    mask[2:4, :4] = 1.0
    outputs = outputs_for([[mask]], [[1]], grid=(16, 16))
    outputs.class_queries_logits[0, 0] = torch.tensor([0.0, 1.0, -50.0, 0.0])
    (result,) = SIMImageProcessor().post_process_instance_segmentation(outputs, [(64, 64)], [(64, 64)], threshold=0.3)
    probability = torch.tensor([0.0, 1.0, 0.0]).softmax(0)[1]
    quality = (torch.tensor(2.0).sigmoid() + torch.tensor(1.0).sigmoid()) / 2
    torch.testing.assert_close(result["scores"], (probability * quality)[None])
    assert result["labels"].tolist() == [1]


def test_one_query_may_stand_for_two_classes_and_the_best_come_first():
    outputs = outputs_for([[torch.full((8, 8), 9.0)]], [[0]], grid=(8, 8))
    outputs.class_queries_logits[0, 0] = torch.tensor([1.0, 2.0, -50.0, 0.0])
    process = SIMImageProcessor().post_process_instance_segmentation
    (result,) = process(outputs, [(32, 32)], [(32, 32)], threshold=0.01)
    assert result["labels"].tolist() == [1, 0] and result["scores"][0] > result["scores"][1]
    (best,) = process(outputs, [(32, 32)], [(32, 32)], threshold=0.01, max_instances=1)
    assert best["labels"].tolist() == [1]


def test_soft_nms_lowers_the_scores_of_worse_masks_of_the_same_class():
    """By hand, sigma 0.5: exp(-2 IoU^2) of the score is left, for every better one; the third is better once the second fell."""
    overlap = torch.tensor([[1.0, 0.8, 0.5, 0.8], [0.8, 1.0, 0.1, 0.8], [0.5, 0.1, 1.0, 0.5], [0.8, 0.8, 0.5, 1.0]])
    scores = soft_nms(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 0, 1]), overlap, 0.5)
    third = 0.7 * math.exp(-2 * 0.5**2)  # 0.42
    second = 0.8 * math.exp(-2 * 0.8**2) * math.exp(-2 * 0.1**2)  # 0.22
    torch.testing.assert_close(scores, torch.tensor([0.9, second, third, 0.6]))


def test_the_overlap_of_masks_is_their_iou_and_queries_may_stand_twice():
    masks = torch.full((4, 6, 6), -2.0)
    masks[0, :4, :4], masks[1, :4, :2], masks[2, 4:, 4:] = 2.0, 2.0, 2.0  # 16, 8 and 4 cells; the last is empty
    overlap = mask_overlap(masks, torch.tensor([1, 0, 1, 2, 3]))
    row = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0])
    assert torch.equal(overlap[0], row) and torch.equal(overlap[2], row)
    assert torch.equal(overlap, overlap.T) and overlap.diagonal().tolist() == [1, 1, 1, 1, 0]


def test_an_object_that_is_found_twice_has_one_instance_above_the_threshold():
    grid = (32, 32)
    masks = [disc_logits(grid, (50, 50), 30), disc_logits(grid, (52, 50), 30), disc_logits(grid, (50, 50), 29)]
    outputs = outputs_for([masks], [[0, 0, 1]], grid=grid)
    outputs.class_queries_logits[0, 1, -1] = 8.0  # less sure than the first
    process = [SIMImageProcessor(soft_nms_sigma=sigma).post_process_instance_segmentation for sigma in (0.5, 0)]
    once, twice = (run(outputs, [(128, 128)], [(128, 128)])[0] for run in process)
    assert sorted(once["labels"].tolist()) == [0, 1] and sorted(twice["labels"].tolist()) == [0, 0, 1]
    (everything,) = process[0](outputs, [(128, 128)], [(128, 128)], threshold=0.0, max_instances=3)
    assert everything["scores"].tolist() == sorted(everything["scores"].tolist(), reverse=True)
    assert everything["scores"][0] == twice["scores"][0] and 0 < everything["scores"][2] < 0.3 * twice["scores"][2]


def test_an_object_that_is_found_very_often_leaves_no_instance_with_a_score_of_zero():
    """exp(-2) for every better one: after some fifty of them float32 has no number left."""
    masks = [disc_logits((32, 32), (50, 50), 30)] * 80
    (result,) = SIMImageProcessor().post_process_instance_segmentation(
        outputs_for([masks], [[0] * 80], grid=(32, 32)), [(128, 128)], [(128, 128)], threshold=0.0
    )
    assert 1 < len(result["scores"]) < 80 and result["scores"].min() > 0


def test_parts_far_from_a_mask_go_unless_all_may_stay():
    grid = (32, 32)
    main, bit, near = disc_logits(grid, (40, 40), 24), disc_logits(grid, (110, 100), 12), disc_logits(grid, (40, 76), 8)
    outputs = outputs_for([[torch.maximum(torch.maximum(main, bit), near)]], [[0]], grid=grid)
    before = outputs.masks_queries_logits.clone()
    expected = disc(128, 128, (40, 40), 24) | disc(128, 128, (40, 76), 8)
    for gap, far in ((0.25, 0), (None, disc(128, 128, (110, 100), 12).sum().item())):
        (result,) = SIMImageProcessor(max_part_gap=gap).post_process_instance_segmentation(outputs, [(128, 128)], [(128, 128)])
        mask = result["masks"][0]
        assert mask[90:].sum().item() == pytest.approx(far, rel=0.1) and iou(mask[:90], expected[:90]) > 0.9
        rows, columns = torch.nonzero(mask).unbind(1)
        assert result["boxes"][0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert torch.equal(outputs.masks_queries_logits, before)


def test_as_many_instances_as_queries_where_a_network_has_many():
    masks = [disc_logits((64, 64), (8 + 16 * (k // 15), 8 + 16 * (k % 15)), 6) for k in range(120)]
    outputs = outputs_for([masks], [[0] * 120], grid=(64, 64))
    process = SIMImageProcessor().post_process_instance_segmentation
    for most, found in ((None, 120), (100, 100), (0, 0)):
        (result,) = process(outputs, [(256, 256)], [(256, 256)], max_instances=most)
        assert len(result["scores"]) == found


def test_overlapping_masks_are_kept_and_boxes_are_tight():
    grid = (32, 32)
    masks = [disc_logits(grid, (50, 50), 30), disc_logits(grid, (70, 60), 25)]
    (result,) = SIMImageProcessor().post_process_instance_segmentation(
        outputs_for([masks], [[0, 1]], grid=grid), [(128, 128)], [(128, 128)]
    )
    assert (result["masks"][0] & result["masks"][1]).any()
    for mask, box in zip(result["masks"], result["boxes"], strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("mask", [None, torch.full((16, 16), -5.0)], ids=["no objects", "an empty mask"])
def test_empty_results_have_the_shapes_of_full_ones(mask):
    outputs = outputs_for([[] if mask is None else [mask]], [[] if mask is None else [0]], grid=(16, 16))
    (result,) = SIMImageProcessor().post_process_instance_segmentation(outputs, [(50, 40)], [(60, 48)])
    assert result.pop("segments_info") == []
    assert {name: tuple(tensor.shape) for name, tensor in result.items()} == {
        "scores": (0,),
        "labels": (0,),
        "boxes": (0, 4),
        "masks": (0, 50, 40),
        "segmentation": (50, 40),
    }
    assert result["masks"].dtype == torch.bool and result["labels"].dtype == torch.int64


def test_a_mask_lost_between_the_pixels_of_a_small_image_is_dropped():
    mask = torch.full((64, 64), -5.0)
    mask[32, 32] = 5.0
    (result,) = SIMImageProcessor().post_process_instance_segmentation(
        outputs_for([[mask]], [[0]], grid=(64, 64)), [(5, 4)], [(256, 205)]
    )
    assert len(result["scores"]) == 0


def test_half_precision_outputs_are_processed():
    outputs = outputs_for([[disc_logits((32, 32), (60, 60), 20)]], [[0]], grid=(32, 32))
    outputs.class_queries_logits = outputs.class_queries_logits.bfloat16()
    outputs.masks_queries_logits = outputs.masks_queries_logits.half()
    (result,) = SIMImageProcessor().post_process_instance_segmentation(outputs, [(128, 128)], [(128, 128)])
    assert iou(result["masks"][0], disc(128, 128, (60, 60), 20)) > 0.97 and result["scores"].dtype == torch.float32


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (([(64, 64)], [(300, 64)]), "75 x 16 mask cells"),
        (([(64, 64), (64, 64)], [(64, 64)]), r"original_sizes must hold one .* per image \(1\), got 2"),
    ],
)
def test_sizes_of_another_batch_are_refused(sizes, message):
    outputs = outputs_for([[]], [[]], grid=(16, 16))
    with pytest.raises(ValueError, match=message):
        SIMImageProcessor().post_process_instance_segmentation(outputs, *sizes)
    with pytest.raises(ValueError, match="mask_threshold"):
        SIMImageProcessor().post_process_instance_segmentation(outputs, [(64, 64)], [(64, 64)], mask_threshold=1.0)


def test_stock_habits_give_one_instance_a_pixel():
    """`model(**inputs)` and `target_sizes`, as transformers' own processors have it; the best instance takes a pixel."""
    left, most, middle = torch.full((16, 16), -9.0), torch.full((16, 16), -9.0), torch.full((16, 16), -9.0)
    left[:, :8], most[:, :12], middle[4:8, 2:6] = 9.0, 9.0, 9.0
    outputs = outputs_for([[left, most, middle]], [[0, 1, 2]], grid=(16, 16))
    outputs.class_queries_logits[0, 1, -1], outputs.class_queries_logits[0, 2, -1] = 9.0, 9.5  # less and less sure
    processor = SIMImageProcessor(size={"longest_edge": 64})
    options = {"threshold": 0.0, "max_instances": 3, "mask_threshold": 0.5}
    (result,) = processor.post_process_instance_segmentation(
        outputs, target_sizes=[(128, 128)], overlap_mask_area_threshold=0.3, **options
    )
    (same,) = processor.post_process_instance_segmentation(outputs, [(128, 128)], [(64, 64)], **options)
    assert torch.equal(result["masks"], same["masks"]) and len(result["masks"]) == 3  # overlaps are kept here
    assert [(record["id"], record["label_id"]) for record in result["segments_info"]] == [(0, 0), (1, 1)]  # the third is hidden
    assert result["segmentation"].shape == (128, 128)
    assert set(result["segmentation"].unique().tolist()) == {-1, 0, 1}
    assert torch.equal(result["segmentation"] == 0, result["masks"][0])
    assert torch.equal(result["segmentation"] == 1, result["masks"][1] & ~result["masks"][0])
    assert [record["score"] for record in result["segments_info"]] == pytest.approx(result["scores"][:2].tolist(), abs=1e-6)
    # At the stock threshold of 0.8 the second, of which a third is seen, is left out as well.
    (strict,) = processor.post_process_instance_segmentation(outputs, target_sizes=[(128, 128)], **options)
    assert len(strict["segments_info"]) == 1 and len(strict["masks"]) == 3


def test_without_a_size_of_the_image_there_is_no_mask_of_it():
    with pytest.raises(ValueError, match="target_sizes"):
        SIMImageProcessor().post_process_instance_segmentation(outputs_for([[]], [[]], grid=(16, 16)))
