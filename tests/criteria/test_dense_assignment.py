"""Centre sampling: by hand, and against FCOS's rule asked of every location and instance."""

import math

import pytest
import torch

from sim_hf.criteria.dense_assignment import STRIDES, assign_locations, best_positives, grid_sizes, positives_kept
from sim_hf.structures import InstanceTargets

SIZES = (64.0, 128.0, 256.0, 512.0)


def targets_of(boxes, image_ids=None, *, size=(128, 160), num_images=None):
    image_ids = image_ids or [0] * len(boxes)
    return InstanceTargets(
        boxes_G4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        class_labels_G=torch.zeros(len(boxes), dtype=torch.long),
        image_ids_G=torch.tensor(image_ids, dtype=torch.long),
        input_size=size,
        num_images=num_images or max([0, *image_ids]) + 1,
    )


def every_location(input_size):
    """(level, x, y) in the order of the dense predictions."""
    return [
        (level, (column + 0.5) * stride, (row + 0.5) * stride)
        for level, stride in enumerate(STRIDES)
        for row in range(math.ceil(input_size[0] / stride))
        for column in range(math.ceil(input_size[1] / stride))
    ]


def by_the_rule(targets, sizes=SIZES, radius=1.5):
    """{(image, location): instance}, each location asked about each instance."""
    low, high = [0.0, *sizes], [*sizes, math.inf]
    found = {}
    for image in range(targets.num_images):
        for index, (level, x, y) in enumerate(every_location(targets.input_size)):
            best = None
            for g, (x1, y1, x2, y2) in enumerate(targets.boxes_G4.tolist()):
                if targets.image_ids_G[g] != image:
                    continue
                distances = (x - x1, y - y1, x2 - x, y2 - y)
                near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < radius * STRIDES[level]
                if min(distances) > 0 and near and low[level] <= max(distances) <= high[level]:
                    area = (x2 - x1) * (y2 - y1)
                    if best is None or area < best[0]:
                        best = (area, g)
            if best is not None:
                found[image, index] = best[1]
    return found


def as_dict(assigned):
    keys = zip(assigned.image_ids_N.tolist(), assigned.locations_N.tolist(), strict=True)
    return dict(zip(keys, assigned.instance_ids_N.tolist(), strict=True))


def test_a_box_of_forty_pixels_by_hand():
    """Box 20..60 x 30..70, centre (40, 50): at stride 8 columns with |x - 40| < 12 are 36 and 44 and 28 and 52 is 12 away, so
    x = 36, 44; rows |y - 50| < 12: y = 44, 52, 60. Columns 4, 5 and rows 5, 6, 7 of a grid of 20 columns."""
    assigned = assign_locations(targets_of([[20, 30, 60, 70]]), sizes_of_interest=SIZES)
    assert assigned.locations_N.tolist() == [row * 20 + column for row in (5, 6, 7) for column in (4, 5)]
    assert assigned.centers_N2[0].tolist() == [36, 44]
    assert assigned.distances_N4[0].tolist() == [16, 14, 24, 26]
    assert assigned.centerness()[0] == pytest.approx(math.sqrt(16 / 24 * 14 / 26))


def test_the_level_follows_the_largest_distance():
    wide = assign_locations(targets_of([[10, 50, 150, 70]]), sizes_of_interest=SIZES)  # at least 70 from its centre to a side
    first_of_level = torch.tensor([0, *(h * w for h, w in grid_sizes((128, 160)))]).cumsum(0)
    assert (wide.locations_N >= first_of_level[1]).all() and (wide.locations_N < first_of_level[2]).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_candidates_near_the_centre_are_all_that_the_rule_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(12, 2, generator=generator) * torch.tensor([140.0, 110.0])
    extent = torch.rand(12, 2, generator=generator) ** 2 * 120 + 2
    boxes = torch.cat([corner, torch.minimum(corner + extent, torch.tensor([160.0, 128.0]))], 1)
    if seed == 3:
        boxes = (boxes / 8).round() * 8  # centres on the borders of cells
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 8)
    targets = targets_of(boxes.tolist(), sorted(torch.randint(3, (12,), generator=generator).tolist()), num_images=3)
    assigned = assign_locations(targets, sizes_of_interest=(16.0, 32.0, 64.0, 128.0))
    assert as_dict(assigned) == by_the_rule(targets, sizes=(16.0, 32.0, 64.0, 128.0))
    assert len(as_dict(assigned)) == len(assigned)
    assert (assigned.instance_ids_N.diff() >= 0).all()


def test_a_location_of_two_boxes_belongs_to_the_smaller_one():
    assigned = assign_locations(targets_of([[10, 10, 60, 60], [20, 20, 50, 50]]), sizes_of_interest=SIZES)
    assert set(assigned.instance_ids_N.tolist()) == {1}


def test_of_two_equal_boxes_the_first_has_the_locations():
    assigned = assign_locations(targets_of([[10, 10, 60, 60]] * 2), sizes_of_interest=SIZES)
    assert set(assigned.instance_ids_N.tolist()) == {0}


def test_equal_boxes_in_two_images_do_not_meet():
    assigned = assign_locations(targets_of([[10, 10, 60, 60]] * 2, [0, 1]), sizes_of_interest=SIZES)
    of_first, of_second = assigned.instance_ids_N.bincount().tolist()
    assert of_first == of_second > 0


def test_a_one_pixel_box_between_the_locations_has_none():
    assert len(assign_locations(targets_of([[7.5, 7.5, 8.5, 8.5]]), sizes_of_interest=SIZES)) == 0


def test_a_box_at_the_border_keeps_inside_the_grid():
    assigned = assign_locations(targets_of([[150, 118, 160, 128]]), sizes_of_interest=SIZES)
    assert as_dict(assigned) == by_the_rule(targets_of([[150, 118, 160, 128]]))


def test_no_instance_gives_no_positive():
    assigned = assign_locations(targets_of([], num_images=2), sizes_of_interest=SIZES)
    assert len(assigned) == 0 and assigned.centerness().shape == (0,)


def test_the_budget_of_an_image_is_shared_by_its_instances_that_have_positives():
    targets = targets_of([[0, 0, 9, 9]] * 4, [0, 0, 0, 1])
    ids = torch.tensor([0] * 9 + [1] * 2 + [3] * 9)
    assert positives_kept(ids, targets, 10).tolist() == [5, 2, 0, 9]
    assert positives_kept(ids, targets, 1).tolist() == [1, 1, 0, 1]


def test_the_best_positives_of_each_instance_are_kept_and_ties_go_to_the_first():
    ids, scores = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.1, 0.9, 0.9, 0.2, 0.3])
    assert best_positives(ids, scores, torch.tensor([1, 1])).tolist() == [1, 4]
    assert best_positives(ids, scores, torch.tensor([2, 0])).tolist() == [1, 2]
