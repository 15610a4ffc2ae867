import json

import numpy as np
import pytest

from sim_hf.data.masks import decode_segmentation, encode_rle

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


def test_encode_refuses_a_stack_of_masks():
    with pytest.raises(ValueError, match="height, width"):
        encode_rle(np.zeros((2, 3, 4), bool))
