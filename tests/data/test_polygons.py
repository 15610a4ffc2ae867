import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_fill_holes

from sim_hf.data.polygons import mask_polygons


def decoded(polygons, shape):
    if not polygons:
        return np.zeros(shape, dtype=bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *shape))).astype(bool)


def test_one_pixel_is_a_unit_square():
    mask = np.zeros((4, 5), dtype=bool)
    mask[2, 3] = True
    assert mask_polygons(mask) == [[3.0, 2.0, 4.0, 2.0, 4.0, 3.0, 3.0, 3.0]]


def test_empty_mask_has_no_polygon():
    assert mask_polygons(np.zeros((4, 5), dtype=bool)) == []


def test_straight_sides_keep_their_corners_only():
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:5, 2:7] = True
    (polygon,) = mask_polygons(mask)
    assert len(polygon) == 8


def test_the_largest_region_comes_first():
    """Some tools read the first polygon of an object only."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0] = mask[2:5, 2:6] = mask[6:8, 0:3] = True
    assert [polygon[:2] for polygon in mask_polygons(mask)] == [[2.0, 2.0], [0.0, 6.0], [0.0, 0.0]]


def test_two_regions_are_two_polygons_also_when_they_touch_at_a_corner():
    mask = np.zeros((6, 6), dtype=bool)
    mask[1:3, 1:3] = True
    mask[3:5, 3:5] = True
    polygons = mask_polygons(mask)
    assert len(polygons) == 2
    assert (decoded(polygons, mask.shape) == mask).all()


def test_a_hole_is_filled_since_coco_cannot_say_it():
    mask = np.ones((5, 5), dtype=bool)
    mask[2, 2] = False
    assert decoded(mask_polygons(mask), mask.shape).all()


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_polygons_decode_to_the_same_pixels(density):
    rng = np.random.default_rng(int(density * 10))
    for _ in range(30):
        mask = rng.random((13, 17)) < density
        expected = binary_fill_holes(mask, structure=np.ones((3, 3)))
        assert (decoded(mask_polygons(mask), mask.shape) == expected).all()
