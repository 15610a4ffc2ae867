"""Where labelling looks: windows by hand, and what must hold for any boxes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sim_hf.label_views import _windows, pixel_region, views_of


def regions_and_owners(picture_size, boxes, **options):
    options = {"small": 0.5, "margins": (0.2,), "mirrored": False, **options}
    return [(view.region, view.owners) for view in views_of(picture_size, torch.tensor(boxes), **options)]


def test_small_boxes_are_shown_narrow_and_wide_and_the_whole_picture_only_once():
    boxes = [[40.0, 30.0, 60.0, 40.0], [0.0, 0.0, 90.0, 80.0]]
    # The first box is 20 wide: squares of 29, 69 and 121 pixels around (50, 35), the last of which is the picture itself. The
    # second is moved into the picture.
    assert regions_and_owners((100, 80), boxes, margins=(0.2, 1.2, 2.5)) == [
        ((0, 0, 100, 80), (0, 1)), ((35, 20, 64, 49), (0,)), ((15, 0, 84, 69), (0,)),
    ]  # fmt: skip


def test_a_mirrored_view_has_mirrored_boxes():
    boxes = torch.tensor([[40.0, 30.0, 60.0, 40.0], [0.0, 0.0, 90.0, 80.0]])
    view = views_of((100, 80), boxes, small=0.5, margins=(0.2,), mirrored=True)[-1]
    assert view.mirrored and view.region == (35, 20, 64, 49) and view.boxes(boxes).tolist() == [[4.0, 10.0, 24.0, 20.0]]


def test_neighbours_of_a_similar_size_share_a_window():
    boxes = [[100.0, 100.0, 120.0, 120.0], [124.0, 100.0, 140.0, 116.0], [400.0, 400.0, 420.0, 420.0]]
    # 20 px and twice as much on each side: 101 px. Both boxes with a fifth around them lie in x 96 ... 144, y 96 ... 124.
    assert regions_and_owners((500, 500), boxes, margins=(2.0,)) == [
        ((0, 0, 500, 500), (0, 1, 2)), ((69, 59, 170, 160), (0, 1)), ((359, 359, 460, 460), (2,)),
    ]  # fmt: skip


def test_boxes_below_a_third_of_their_neighbour_get_a_window_of_their_own():
    boxes = [[100.0, 100.0, 130.0, 130.0], [135.0, 100.0, 144.0, 109.0]]
    assert [owners for _, owners in regions_and_owners((500, 500), boxes, margins=(2.0,))] == [(0, 1), (0,), (1,)]


def test_a_narrow_margin_leaves_neighbours_apart():
    boxes = [[100.0, 100.0, 120.0, 120.0], [121.0, 100.0, 141.0, 120.0]]
    assert [owners for _, owners in regions_and_owners((500, 500), boxes)] == [(0, 1), (0,), (1,)]


def test_a_crowd_of_hundreds_is_shown_by_few_windows():
    boxes = [[20.0 * x, 20.0 * y, 20.0 * x + 16, 20.0 * y + 16] for x in range(20) for y in range(20)]
    assert len(regions_and_owners((400, 400), boxes, margins=(3.0,))) < 400 / 8


def test_no_box_no_view_and_large_boxes_the_whole_picture_alone():
    assert regions_and_owners((100, 80), torch.zeros(0, 4).tolist()) == []
    assert regions_and_owners((100, 80), [[0.0, 0.0, 90.0, 80.0]]) == [((0, 0, 100, 80), (0,))]


def test_a_box_of_one_pixel_in_the_corner_and_one_outside_are_shown():
    for box in ([99.0, 79.0, 100.0, 80.0], [150.0, 90.0, 160.0, 95.0]):
        for margin in (0.0, 3.0):
            (left, top, right, bottom), owners = regions_and_owners((100, 80), [box], margins=(margin,))[-1]
            assert owners == (0,) and left <= 99 < right <= 100 and top <= 79 < bottom <= 80


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=30),
    st.sampled_from([(0.0,), (0.2, 0.6, 1.2), (3.0,)]),
)
def test_every_small_box_is_wholly_in_one_window_of_each_margin(picture_size, fractions, margins):
    width, height = picture_size
    boxes = torch.tensor(
        [[min(a, c) * width, min(b, d) * height, max(a, c) * width, max(b, d) * height] for a, b, c, d in fractions]
    )
    views = views_of(picture_size, boxes, small=0.5, margins=margins, mirrored=False)
    assert len(set(views)) == len(views)
    for margin in margins:
        windows = _windows(picture_size, boxes, list(range(len(boxes))), margin)
        assert sorted(i for view in windows for i in view.owners) == list(range(len(boxes)))
    whole = (0, 0, width, height)
    for i, box in enumerate(boxes):
        mine = [view for view in views if i in view.owners and view.region != whole]
        assert len(mine) <= len(margins)
        for view in views:
            if i in view.owners:
                left, top, right, bottom = pixel_region(box, height, width)
                assert view.region[0] <= left < right <= view.region[2] and view.region[1] <= top < bottom <= view.region[3]
