"""Boxes as people write them."""

import json

import pytest

from boxes import MAX_BOXES, MAX_TEXT, NamedBox, boxes_inside, parse_boxes
from uploads import UploadError


@pytest.mark.parametrize(
    "line", ["1,2,30,40", "1 2 30 40", " 1.0, 2.0; 30 , 40 ", "[1, 2, 30, 40]", "(1,2),(30,40)", "1\t2 30 40"]
)
def test_four_numbers_in_a_line_are_a_box_however_they_are_separated(line):
    assert parse_boxes(line) == [NamedBox(1, 2, 30, 40)]


def test_empty_lines_between_boxes_are_nothing():
    assert len(parse_boxes("1 2 3 4\n\n5 6 7 8\n")) == 2


def test_a_list_of_lists_is_one_box_a_line():
    assert parse_boxes("[[1, 2, 3, 4],\n [5, 6, 7, 8]]") == [NamedBox(1, 2, 3, 4), NamedBox(5, 6, 7, 8)]


@pytest.mark.parametrize("line", ["1 2 3", "1 2 3 4 5", "a b c d", "<script>"])
def test_a_line_that_is_no_box_is_named(line):
    with pytest.raises(UploadError, match="Line 2 is not four numbers"):
        parse_boxes(f"1 2 3 4\n{line}")


@pytest.mark.parametrize("text", ["", "   \n "])
def test_no_boxes_is_an_error_that_says_how_boxes_are_written(text):
    with pytest.raises(UploadError, match="x1, y1, x2, y2"):
        parse_boxes(text)


def test_a_coco_document_gives_corners_and_names_and_leaves_crowds_out():
    document = {
        "categories": [{"id": 7, "name": "otter"}],
        "annotations": [
            {"image_id": 3, "category_id": 7, "bbox": [10, 20, 30, 40]},
            {"image_id": 3, "category_id": 8, "bbox": [1, 2, 3, 4]},
            {"image_id": 3, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    assert parse_boxes(json.dumps(document)) == [NamedBox(10, 20, 40, 60, "otter"), NamedBox(1, 2, 4, 6)]
    assert parse_boxes(json.dumps(document["annotations"][:1])) == [NamedBox(10, 20, 40, 60)]


def test_boxes_of_two_images_are_not_mixed():
    annotations = [{"image_id": i, "bbox": [1, 2, 3, 4]} for i in (1, 2)]
    with pytest.raises(UploadError, match="2 images"):
        parse_boxes(json.dumps({"annotations": annotations}))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"annotations": 3}',
        '{"annotations": [3]}',
        '{"annotations": [{}]}',
        '{"annotations": [{"bbox": [1, 2, 3]}]}',
        '{"annotations": [{"bbox": ["1", 2, 3, 4]}]}',
        '{"annotations": [{"bbox": [1, 2, 3, 1' + "0" * 400 + "]}]}",
        '{"annotations": [{"bbox": [1, 2, 3, 1' + "0" * 5000 + "]}]}",
        "[" * 3 + "{" * 100_000,
        '[{"a":' * 100_000,
    ],
    ids=["broken", "no list", "no object", "no box", "three", "text", "400 digits", "5000 digits", "brackets", "deep"],
)
def test_json_that_holds_no_boxes_is_an_error_for_people(text):
    with pytest.raises(UploadError):
        parse_boxes(text)


def test_a_novel_is_not_parsed():
    with pytest.raises(UploadError, match="too much text"):
        parse_boxes("1 2 3 4\n" * (MAX_TEXT // 8 + 1))


def test_a_box_that_sticks_out_is_cut_at_the_border():
    assert boxes_inside([NamedBox(-5, 10, 30, 99, "otter")], (50, 100)) == [NamedBox(0, 10, 30, 50, "otter")]


@pytest.mark.parametrize("box", [(100, 0, 120, 10), (0, 60, 10, 70), (-9, -9, -1, -1), (99.5, 0, 300, 10)])
def test_a_box_outside_the_picture_is_an_error_that_names_both(box):
    with pytest.raises(UploadError, match=r"Box 1 .*outside the picture, which is 100 x 50 pixels"):
        boxes_inside([NamedBox(*box)], (50, 100))


@pytest.mark.parametrize("box", [(10, 10, 10, 20), (20, 10, 10, 20)])
def test_an_empty_or_inverted_box_is_an_error(box):
    with pytest.raises(UploadError, match="is empty"):
        boxes_inside([NamedBox(*box)], (50, 100))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_that_is_not_finite_is_an_error(value):
    with pytest.raises(UploadError, match="not finite"):
        boxes_inside(parse_boxes(f"0 0 {value} 10"), (50, 100))


def test_a_small_box_inside_is_kept():
    assert boxes_inside([NamedBox(3.2, 4.2, 3.7, 4.6)], (50, 100)) == [NamedBox(3.2, 4.2, 3.7, 4.6)]


def test_no_boxes_and_too_many_are_errors():
    with pytest.raises(UploadError, match="no boxes yet"):
        boxes_inside([], (50, 100))
    with pytest.raises(UploadError, match=f"at most {MAX_BOXES}"):
        boxes_inside([NamedBox(0, 0, 9, 9)] * (MAX_BOXES + 1), (50, 100))
