import numpy as np
import pytest
import torch
from PIL import Image

from sim_hf.visualization import contact_sheet, draw_instances

NAMES = {0: "disc", 1: "block"}


def _result(num=2, side=100):
    masks = torch.zeros(num, side, side, dtype=torch.bool)
    boxes = []
    for k in range(num):
        low, high = 10 + 40 * k, 40 + 40 * k
        masks[k, low:high, low:high] = True
        boxes.append([low, low, high, high])
    return {
        "boxes": torch.tensor(boxes).float().reshape(-1, 4),
        "labels": torch.arange(num),
        "masks": masks,
        "scores": torch.linspace(0.9, 0.4, num),
    }


def _changed(image, drawn):
    before = np.asarray(image.resize(drawn.size, Image.Resampling.LANCZOS)).astype(int)
    return np.abs(np.asarray(drawn).astype(int) - before).max(-1) > 8


GRAY = Image.new("RGB", (100, 100), (128, 128, 128))


def test_small_pictures_are_enlarged_and_large_ones_keep_their_size():
    assert draw_instances(GRAY, _result()).size == (640, 640)
    assert draw_instances(Image.new("RGB", (900, 450)), _result()).size == (900, 450)
    assert draw_instances(Image.new("RGB", (900, 450)), _result(), side=300).size == (300, 150)


def test_masks_color_their_inside_and_nothing_far_outside():
    drawn = draw_instances(GRAY, _result(), side=400, with_boxes=False, with_labels=False)
    changed = _changed(GRAY, drawn)
    assert changed[45:155, 45:155].all() and changed[205:315, 205:315].all()
    outside = changed.copy()
    outside[30:170, 30:170] = outside[190:330, 190:330] = False
    assert not outside.any()


def test_instances_differ_in_color():
    pixels = np.asarray(draw_instances(GRAY, _result(), side=400, with_boxes=False, with_labels=False)).astype(int)
    assert np.abs(pixels[100, 100] - pixels[260, 260]).max() > 40


def test_contour_is_smooth_on_enlarged_masks():
    drawn = draw_instances(GRAY, _result(1), side=500, with_boxes=False, with_labels=False)
    assert len(np.unique(np.asarray(drawn)[100, 40:60, 0])) >= 4, "the edge is a ramp, not a step"


def test_boxes_alone_leave_the_inside_untouched():
    changed = _changed(GRAY, draw_instances(GRAY, _result(), side=400, with_masks=False, with_labels=False))
    assert changed[100, 40] and not changed[60:140, 60:140].any()


def test_threshold_and_limit_leave_instances_out():
    nothing = draw_instances(GRAY, _result(), threshold=0.95, side=400)
    assert not _changed(GRAY, nothing).any()
    best = _changed(GRAY, draw_instances(GRAY, _result(), max_instances=1, side=400))
    assert best[100, 100] and not best[260, 260]


def test_annotations_without_scores_and_masks_can_be_drawn():
    result = {"boxes": [[10, 10, 40, 40]], "labels": [1]}
    assert _changed(GRAY, draw_instances(GRAY, result, NAMES)).any()


def test_result_without_instances_gives_the_picture():
    drawn = draw_instances(GRAY, {"boxes": torch.zeros(0, 4), "labels": [], "masks": torch.zeros(0, 100, 100)}, side=100)
    assert np.array_equal(np.asarray(drawn), np.asarray(GRAY))


@pytest.mark.parametrize("box", [[0, 0, 100, 100], [99, 99, 100, 100], [50, 50, 50, 50], [-20, -20, 5, 5]])
def test_boxes_at_and_over_the_border_are_drawn_without_error(box):
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[0, 99, 99] = True
    draw_instances(GRAY, {"boxes": torch.tensor([box]), "labels": [0], "masks": mask, "scores": [0.5]}, NAMES)


def test_picture_is_not_changed_in_place():
    before = np.asarray(GRAY).copy()
    draw_instances(GRAY, _result(), side=100)
    assert np.array_equal(np.asarray(GRAY), before)


def test_sheet_has_room_for_every_cell_title_and_caption():
    wide, tall = Image.new("RGB", (200, 100), "red"), Image.new("RGB", (100, 200), "blue")
    sheet = contact_sheet([[wide, tall], [wide, None]], ["input", "mask"], ["first", "second"], cell_size=100, gap=10)
    assert sheet.size == (2 * 110 + 10, 10 + 34 + (100 + 28 + 10) + (50 + 28 + 10))
    pixels = np.asarray(sheet)
    assert pixels[44 + 50, 10 + 50].tolist() == [255, 0, 0] and pixels[44 + 50, 120 + 50].tolist() == [0, 0, 255]
    assert pixels[44 + 138 + 25, 120 + 50].tolist() == [255, 255, 255]


def test_sheet_without_rows_and_with_long_titles_is_a_picture():
    assert contact_sheet([], ["a title that is much longer than its column could ever be"], cell_size=80).width == 104


@pytest.mark.parametrize(("num", "named"), [(30, True), (31, False)])
def test_names_are_left_out_where_they_would_hide_many_objects(num, named):
    image = Image.new("RGB", (640, 640), "white")
    corners = torch.tensor([[60.0 + 80 * (k % 6), 60.0 + 80 * (k // 6)] for k in range(num)])
    result = {"boxes": torch.cat([corners, corners + 30], 1), "labels": torch.zeros(num, dtype=torch.long)}
    pictures = [draw_instances(image, result, NAMES, with_labels=labels).tobytes() for labels in (True, False)]
    assert (pictures[0] != pictures[1]) == named
