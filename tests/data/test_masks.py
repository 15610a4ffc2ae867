import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sim_hf.data.masks import checked_rles, decode_segmentation, encode_rle, segmentation_rle

SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]


def _square():
    mask = np.zeros((8, 10), dtype=bool)
    mask[1:4, 2:6] = True
    return mask


def test_polygon_text_fills_its_corners():
    assert np.array_equal(decode_segmentation(json.dumps(SQUARE), 8, 10), _square())


def test_several_polygons_are_united():
    mask = decode_segmentation([*SQUARE, [7, 5, 9, 5, 9, 7, 7, 7]], 8, 10)
    assert mask.sum() == 12 + 4


def test_uncompressed_run_lengths_run_down_the_columns():
    mask = decode_segmentation({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert mask.tolist() == [[False, True, False], [True, False, False]]


def test_encoding_and_decoding_are_inverse_and_json_ready():
    random = np.random.default_rng(0).random((17, 23)) > 0.5
    for mask in (_square(), random, np.zeros((5, 4), bool), np.ones((5, 4), bool)):
        text = json.dumps(encode_rle(mask))
        assert np.array_equal(decode_segmentation(text, *mask.shape), mask)


def test_polygon_part_without_area_is_left_out():
    assert np.array_equal(decode_segmentation([[1, 1, 2, 2], *SQUARE], 8, 10), _square())


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("[[1, 2", "not JSON"),
        ([], "three corners"),
        ([[1, 1, 2, 2]], "three corners"),
        ([[1, 1, 2, 2, 3]], "x1, y1"),
        ([[1, 1, 2, float("nan"), 3, 3]], "finite"),
        ([[1, 1, 2, "x", 3, 3]], "finite"),
        ({"size": [10, 8], "counts": [80]}, r"size \[10, 8\]"),
        ({"size": [8, 10], "counts": [81]}, "add up to 80"),
        ({"size": [8, 10], "counts": [-1, 81]}, "add up to 80"),
        ({"size": [8, 10]}, "counts"),
        ("3", "int"),
        ("[" * 5000, "not JSON"),
    ],
)
def test_faulty_segmentation_is_an_error_that_names_the_annotation(segmentation, message):
    with pytest.raises(ValueError, match=message) as error:
        decode_segmentation(segmentation, 8, 10, annotation_id=4711)
    assert "4711" in str(error.value)


def test_broken_compressed_counts_do_not_crash_the_process():
    with pytest.raises(ValueError, match="annotation 5"):
        decode_segmentation({"size": [8, 10], "counts": "PPPP"}, 8, 10, annotation_id=5)


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_encoding_is_that_of_pycocotools_whatever_the_mask_and_its_order_in_memory(dtype):
    inside = np.zeros((60, 50), dtype=bool)
    inside[20:31, 7:40] = np.random.default_rng(2).random((11, 33)) > 0.3
    masks = [*_random_masks(500), inside, np.zeros((0, 4), bool), np.zeros((4, 0), bool)]
    for axis in (0, 1):  # against each edge, and from one to the other
        for width in (3, 25, 60):
            band = np.zeros((60, 60), dtype=bool)
            np.moveaxis(band, axis, 0)[:width] = True
            masks += [band, ~band, np.roll(band, 9, axis)]
    for mask in masks:
        expected = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        for same in (mask, np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2]):
            assert encode_rle(same.astype(dtype)) == {"size": list(mask.shape), "counts": expected["counts"].decode()}


def test_encode_refuses_a_stack_of_masks():
    with pytest.raises(ValueError, match="height, width"):
        encode_rle(np.zeros((2, 3, 4), bool))


def _random_masks(count, seed=0):
    """From a pixel to sides of more than 1024 pixels (numbers of three digits), empty, full and everything between."""
    random = np.random.default_rng(seed)
    shapes = [tuple(random.integers(1, limit, 2)) for limit in random.choice([4, 12, 40], count)] + [(1300, 3), (3, 1300)]
    for height, width in shapes:
        yield random.random((height, width)) < random.choice([0.0, 0.02, 0.5, 0.98, 1.0])


def _written(numbers):
    """Numbers, differences and all, as the characters of `counts`."""
    text = ""
    for number in numbers:
        while not -16 <= number < 16:
            text, number = text + chr(48 + 32 + (number & 31)), number >> 5
        text += chr(48 + (number & 31))
    return text


def test_run_lengths_that_need_no_change_are_given_back_as_they_are():
    rles = [encode_rle(mask) for mask in _random_masks(300)]
    assert checked_rles(rles) == rles and checked_rles(rles)[0] is not rles[0]
    for rle in rles:
        assert segmentation_rle(rle, *rle["size"]) == segmentation_rle(json.dumps(rle), *rle["size"]) == rle
    assert checked_rles([]) == []


def test_every_way_to_write_a_mask_gives_what_encoding_its_pixels_gives():
    with_empty_runs = {"size": [2, 5], "counts": [0, 0, 2, 1, 0, 0, 3, 0, 0, 4, 0]}
    compressed = coco_mask.frPyObjects(with_empty_runs, 2, 5)
    as_text = {"size": [2, 5], "counts": compressed["counts"].decode()}
    too_long = {"size": [2, 5], "counts": "R0" + _written([8])}  # 2 with a digit too many
    as_bytes = {"size": [2, 5], "counts": _written([2, 8]).encode()}
    for rle in (with_empty_runs, compressed, as_text, too_long, as_bytes):
        expected = encode_rle(decode_segmentation(rle, 2, 5))
        plain = encode_rle(np.eye(2, 5, dtype=bool))
        assert segmentation_rle(rle, 2, 5) == expected
        assert checked_rles([plain, rle, plain]) == [plain, expected, plain]
    assert decode_segmentation(too_long, 2, 5).sum() == 8


def test_polygons_become_the_run_lengths_of_their_pixels():
    random = np.random.default_rng(1)
    for _ in range(300):
        height, width = random.integers(1, 40, 2).tolist()
        parts = [
            random.uniform(-8, 45, 2 * random.integers(3, 8)).round(random.integers(3)) for _ in range(random.integers(1, 4))
        ]
        polygons = [part.tolist() for part in parts] + [[1, 1, 2, 2]]
        assert segmentation_rle(polygons, height, width) == encode_rle(decode_segmentation(polygons, height, width))


BROKEN_COUNTS = {  # of masks of 8 x 10 pixels
    "too few pixels": (_written([30, 20]), "add up to 50, the image has 80"),
    "too many pixels": (_written([30, 20, 31]), "add up to 81, the image has 80"),
    "a negative run": (_written([30, -5, 55]), "negative length"),
    "a negative run from a difference": (_written([30, 5, 40, -6, 11]), "negative length"),
    "cut off in a number": (_written([30, 20, 30])[:-1], "middle of a number"),
    "not ASCII": (_written([30, 20]) + "\u00e9", "not ASCII"),
    "a line end": (_written([80]) + "\n", "a character that"),
    "a number without end": ("P" * 12 + "0", "more than 7 digits"),
    "no character": ("", "empty"),
}


@pytest.mark.parametrize("fault", BROKEN_COUNTS)
def test_broken_counts_are_an_error_that_says_what_is_wrong(fault):
    counts, message = BROKEN_COUNTS[fault]
    broken = {"size": [8, 10], "counts": counts}
    with pytest.raises(ValueError, match=f"annotation 5: .*{message}"):
        decode_segmentation(broken, 8, 10, annotation_id=5)
    with pytest.raises(ValueError, match=message):
        segmentation_rle(broken, 8, 10)
    with pytest.raises(ValueError, match=f"run lengths 1 are broken: .*{message}"):
        checked_rles([encode_rle(_square()), broken])


def test_faults_of_two_run_lengths_do_not_make_up_for_each_other():
    few, many = ({"size": [8, 10], "counts": _written([total])} for total in (79, 81))
    with pytest.raises(ValueError, match=r"run lengths 0 .*add up to 79"):
        checked_rles([few, many])
