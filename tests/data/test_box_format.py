"""Boxes: corners are told from sizes, and each kind of misfit is dropped or clipped exactly."""

import numpy as np
import pytest

from sim_hf.data.box_format import duplicate_boxes, looks_like_xyxy, repair_boxes, xyxy_to_xywh

SIZES_A2 = np.array([[640.0, 480.0]])


def random_corners(generator, count):
    """Objects of all sizes anywhere in a 640 x 480 image, as in photographs."""
    low, high = np.sort(generator.uniform(0, 1, (2, count, 2)), axis=0)
    corners = np.concatenate([low, high], axis=1) * np.tile(SIZES_A2, 2)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 1).clip(max=np.array([640, 480]))
    corners[:, :2] = np.minimum(corners[:, :2], corners[:, 2:] - 1)
    return corners


def repaired(*box):
    repair = repair_boxes(np.array([box], dtype=float), SIZES_A2)
    return repair, repair.boxes_A4[0].tolist()


def test_corners_are_always_recognised_in_twenty_boxes_and_true_sizes_never():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        corners = random_corners(generator, 20)
        sizes_A2 = np.tile(SIZES_A2, (20, 1))
        assert looks_like_xyxy(corners, sizes_A2)
        assert not looks_like_xyxy(xyxy_to_xywh(corners), sizes_A2)


def test_careless_boxes_at_the_border_are_not_taken_for_corners():
    boxes = np.array([[2.0, 2.0, 641.0, 482.0]] * 20)  # valid corners too, but they leave by three pixels only
    assert not looks_like_xyxy(boxes, np.tile(SIZES_A2, (20, 1)))


def test_boxes_that_fit_neither_reading_are_not_taken_for_corners():
    boxes = np.array([[600.0, 400.0, 300.0, 300.0]] * 20)
    assert not looks_like_xyxy(boxes, np.tile(SIZES_A2, (20, 1)))


def test_no_boxes_and_boxes_of_nan_look_like_nothing():
    assert not looks_like_xyxy(np.zeros((0, 4)), np.zeros((0, 2)))
    assert not looks_like_xyxy(np.full((5, 4), np.nan), np.tile(SIZES_A2, (5, 1)))


def test_corners_become_corner_and_size():
    assert xyxy_to_xywh(np.array([[10.0, 20.0, 40.0, 60.0]])).tolist() == [[10, 20, 30, 40]]


def test_a_box_inside_keeps_its_very_numbers():
    repair, box = repaired(0.1, 0.2, 0.3, 479.8)
    assert box == [0.1, 0.2, 0.3, 479.8] and repair.keep_A[0] and not repair.clipped_A[0]


def test_a_box_of_the_whole_image_is_inside():
    repair, box = repaired(0, 0, 640, 480)
    assert box == [0, 0, 640, 480] and repair.keep_A[0] and not repair.clipped_A[0]


def test_a_pixel_of_overshoot_is_clipped_without_counting():
    repair, box = repaired(600, 440, 41, 41)
    assert box == [600, 440, 40, 40] and repair.keep_A[0] and not repair.clipped_A[0]


def test_more_than_a_pixel_of_overshoot_is_clipped_and_counted():
    repair, box = repaired(-10, 440, 30, 50)
    assert box == [0, 440, 20, 40] and repair.keep_A[0] and repair.clipped_A[0]


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ((np.nan, 0, 1, 1), "not_finite_A"),
        ((0, 0, np.inf, 1), "not_finite_A"),
        ((0, 0, -1, 0), "negative_A"),
        ((0, 0, 0, 5), "empty_A"),
        ((0, 0, -0.0, 5), "empty_A"),
        ((640, 0, 5, 5), "outside_A"),
        ((-5, 0, 5, 5), "outside_A"),
        ((0, 479.999, 5, 5), "outside_A"),
        ((0, 1e300, 5, 5), "outside_A"),
    ],
)
def test_each_unusable_box_is_dropped_for_one_reason(box, kind):
    repair, _ = repaired(*box)
    assert not repair.keep_A[0]
    reasons = {name: bool(getattr(repair, name)[0]) for name in ("not_finite_A", "negative_A", "empty_A", "outside_A")}
    assert [name for name, true in reasons.items() if true] == [kind]


def test_a_hair_thin_box_inside_stays():
    repair, box = repaired(10, 10, 0.001, 5)
    assert repair.keep_A[0] and box == [10, 10, 0.001, 5]


def test_no_boxes_are_repaired_to_no_boxes():
    repair = repair_boxes(np.zeros((0, 4)), np.zeros((0, 2)))
    assert repair.boxes_A4.shape == (0, 4) and repair.keep_A.shape == (0,)


def test_repeated_boxes_are_found_within_their_image_and_class_only():
    box = [1.0, 2.0, 3.0, 4.0]
    boxes = np.array([box, [9.0, 2.0, 3.0, 4.0], box, box, box, box])
    groups = np.array([[0, 0], [0, 0], [0, 1], [0, 0], [1, 0], [0, 0]])  # image, label
    assert duplicate_boxes(boxes, groups).tolist() == [False, False, False, True, False, True]
    assert duplicate_boxes(boxes[:0], groups[:0]).tolist() == []
