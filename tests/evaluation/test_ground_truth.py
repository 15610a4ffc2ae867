"""The ground truth that evaluation uses: normalised, complete, and honest about its masks."""

import copy
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from pycocotools import mask as coco_mask

from sim_hf.data.category_ids import category_description
from sim_hf.evaluation.ground_truth import coco_ground_truth

TRIANGLE = [0, 0, 8, 0, 0, 8]


def truth(*annotations: dict) -> dict:
    return {
        "images": [{"id": 4, "width": 10, "height": 8}],
        "categories": [{"id": 2, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [{"image_id": 4, "category_id": 9, "bbox": [1, 2, 3, 4], **annotation} for annotation in annotations],
    }


def only(source: dict) -> dict:
    (annotation,) = coco_ground_truth(source)["annotations"]
    return annotation


def decoded(annotation: dict) -> np.ndarray:
    return coco_mask.decode(annotation["segmentation"]).astype(bool)


def test_annotation_ids_are_renumbered_from_one():
    annotations = coco_ground_truth(truth({"id": 0}, {"id": 0}, {"id": "x"}, {}))["annotations"]
    assert [annotation["id"] for annotation in annotations] == [1, 2, 3, 4]


def test_box_area_fills_a_missing_area_where_there_is_no_mask():
    assert only(truth({}))["area"] == 12.0


def test_mask_area_fills_a_missing_area_where_there_is_a_mask():
    mask_HW = np.zeros((8, 10), dtype=np.uint8)
    mask_HW[2:6, 1:3] = 1
    run_lengths = coco_mask.encode(np.asfortranarray(mask_HW))
    segmentation = {"size": [8, 10], "counts": run_lengths["counts"].decode()}
    assert only(truth({"segmentation": segmentation}))["area"] == 8.0


def test_given_area_and_crowd_flag_stay():
    annotation = only(truth({"area": 5.5, "iscrowd": 1}))
    assert (annotation["area"], annotation["iscrowd"]) == (5.5, 1)


def test_missing_box_is_that_of_the_mask():
    annotation = only(truth({"bbox": None, "segmentation": {"size": [8, 10], "counts": [17, 2, 61]}}))
    assert annotation["bbox"] == [2.0, 1.0, 1.0, 2.0]  # pixels 17 and 18, down the columns of 8 rows


def test_polygons_and_both_kinds_of_run_lengths_give_the_same_mask():
    polygon = coco_mask.merge(coco_mask.frPyObjects([TRIANGLE], 8, 10))
    mask_HW = coco_mask.decode(polygon)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask_HW.T.ravel(), [2]])))
    counts = np.diff(np.concatenate([[0], changes])).tolist()
    variants = [[TRIANGLE], {"size": [8, 10], "counts": polygon["counts"].decode()}, {"size": [8, 10], "counts": counts}]
    variants.append(json.dumps([TRIANGLE]))
    ground_truth = coco_ground_truth(truth(*({"segmentation": variant} for variant in variants)))
    assert ground_truth["has_masks"]
    for annotation in ground_truth["annotations"]:
        assert np.array_equal(decoded(annotation), mask_HW.astype(bool))
        assert isinstance(annotation["segmentation"]["counts"], str)


def test_parts_of_a_polygon_without_area_are_left_out():
    annotation = only(truth({"segmentation": [[1, 1, 5, 5], TRIANGLE]}))  # pycocotools takes four numbers for a box
    assert np.array_equal(decoded(annotation), decoded(only(truth({"segmentation": [TRIANGLE]}))))


def test_box_only_file_has_no_masks():
    ground_truth = coco_ground_truth(truth({}, {"segmentation": []}, {"segmentation": ""}))
    assert not ground_truth["has_masks"] and ground_truth["num_without_mask"] == 3


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, "annotation 7 has no segmentation"),
        ([[1, 1, 5, 5]], "annotation 7: .*three corners"),
        ([[1, 1, 5, float("nan"), 3, 3]], "annotation 7: .*not finite"),
        ({"counts": "abc"}, "annotation 7: .*size None"),
        ({"size": [10, 8], "counts": [80]}, r"annotation 7: .*size \[10, 8\]"),
        ("no json", "annotation 7: .*not JSON"),
        ({"size": [8, 10], "counts": "5"}, "annotation 7: .*add up to 5, the image has 80"),
        ({"size": [8, 10], "counts": "P"}, "annotation 7: .*middle of a number"),
    ],
)
def test_unusable_mask_is_counted_and_named_but_the_box_stays(segmentation, reason):
    ground_truth = coco_ground_truth(truth({"segmentation": [TRIANGLE]}, {"id": 7, "segmentation": segmentation}))
    assert not ground_truth["has_masks"] and ground_truth["num_without_mask"] == 1
    assert len(ground_truth["annotations"]) == 2 and "segmentation" not in ground_truth["annotations"][1]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(ground_truth["mask_problems"][0])


def test_crowd_without_mask_becomes_its_filled_box_and_does_not_count_as_missing():
    ground_truth = coco_ground_truth(truth({"segmentation": [TRIANGLE]}, {"iscrowd": 1}))
    assert ground_truth["has_masks"]
    mask_HW = decoded(ground_truth["annotations"][1])
    assert mask_HW.sum() == 12 and mask_HW[2:6, 1:4].all()


def test_source_is_not_changed_and_a_second_pass_changes_nothing():
    source = truth({"segmentation": [TRIANGLE]}, {"id": 0})
    before = copy.deepcopy(source)
    once = coco_ground_truth(source)
    assert source == before
    assert coco_ground_truth(once)["annotations"] == once["annotations"]


def test_file_with_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth({})), encoding="utf-8-sig")
    assert coco_ground_truth(path) == coco_ground_truth(str(path)) == coco_ground_truth(truth({}))


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"images": []}', "{" * 10, "[" * 100_000, '{"images": ' + "9" * 5000 + "}"])
def test_file_that_is_no_annotation_file_is_refused(tmp_path, text):
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(ValueError):
        coco_ground_truth(tmp_path / "truth.json")


def test_ids_written_as_digits_are_taken_as_numbers():
    source = truth({})
    source["images"][0]["id"] = "4"
    source["annotations"][0]["category_id"] = "9"
    assert only(source)["image_id"] == 4 and only(source)["category_id"] == 9


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("annotations", 0, "image_id"), 5, "annotation number 1 belongs to image 5"),
        (("annotations", 0, "category_id"), 5, "annotation number 1 has category 5"),
        (("annotations", 0, "bbox"), None, "bbox of annotation number 1"),
        (("annotations", 0, "bbox"), [0, 0, float("nan"), 1], "bbox of annotation number 1"),
        (("annotations", 0, "bbox"), [0, 0, -1, 1], "bbox of annotation number 1"),
        (("annotations", 0, "bbox"), [0, 0, "1", 1], "bbox of annotation number 1"),
        (("annotations", 0, "area"), float("inf"), "area of annotation number 1"),
        (("images", 0, "id"), None, "image id must be an integer"),
        (("images", 0, "id"), True, "image id must be an integer"),
        (("images", 0, "height"), 0, "image 4 needs a positive integer height"),
        (("categories", 0, "id"), 9, "category id 9 is there twice"),
        (("images",), {}, "'images' must be a list"),
    ],
)
def test_broken_ground_truth_is_refused_by_name(place, value, message):
    source = truth({})
    target = source
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        coco_ground_truth(source)


OBJECT = {
    "id": Value("int64"),
    "bbox": List(Value("float32"), 4),
    "category": ClassLabel(names=["cat", "dog"]),
    "area": Value("float32"),
    "iscrowd": Value("int64"),
    "segmentation": Value("string"),
}


def as_dataset(struct_of_lists: bool) -> Dataset:
    rows = [
        {"id": 0, "bbox": [1.0, 2, 3, 4], "category": 1, "area": 6.0, "iscrowd": 0, "segmentation": json.dumps([TRIANGLE])},
        {"id": 1, "bbox": [0.0, 0, 2, 2], "category": 0, "area": None, "iscrowd": 1, "segmentation": ""},
    ]
    objects = {name: [row[name] for row in rows] for name in OBJECT} if struct_of_lists else rows
    empty = {name: [] for name in OBJECT} if struct_of_lists else []
    feature = {name: List(kind) for name, kind in OBJECT.items()} if struct_of_lists else List(OBJECT)
    numbers = {name: Value("int64") for name in ("image_id", "width", "height")}
    return Dataset.from_dict(
        {"image_id": [4, 5], "width": [10, 10], "height": [8, 8], "objects": [objects, empty]},
        features=Features({**numbers, "objects": feature}),
    )


@pytest.mark.parametrize("struct_of_lists", [True, False])
def test_dataset_gives_the_same_ground_truth_as_a_file(struct_of_lists):
    ground_truth = coco_ground_truth(as_dataset(struct_of_lists), category_ids=[2, 9])
    expected = truth(
        {"area": 6.0, "segmentation": [TRIANGLE]}, {"bbox": [0, 0, 2, 2], "category_id": 2, "area": None, "iscrowd": 1}
    )
    expected["images"].append({"id": 5, "width": 10, "height": 8})
    assert ground_truth == coco_ground_truth(expected)


def test_labels_of_a_dataset_are_its_category_ids_when_it_knows_no_others():
    ground_truth = coco_ground_truth(as_dataset(True))
    assert ground_truth["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert [annotation["category_id"] for annotation in ground_truth["annotations"]] == [1, 0]


def test_category_ids_must_fit_the_dataset():
    with pytest.raises(ValueError, match="3 ids for the 2 categories"):
        coco_ground_truth(as_dataset(True), category_ids=[1, 2, 3])


def test_dataset_without_the_detection_columns_is_refused():
    with pytest.raises(ValueError, match=r"lacks the columns \['width', 'height', 'objects'\]"):
        coco_ground_truth(Dataset.from_dict({"image_id": [1]}))
    numbers = {"image_id": [1], "width": [5], "height": [5]}
    with pytest.raises(ValueError, match="must hold ClassLabels"):
        coco_ground_truth(Dataset.from_dict({**numbers, "objects": [{"bbox": [[0, 0, 1, 1]], "category": [1]}]}))


def test_original_category_ids_that_the_dataset_keeps_are_used():
    dataset = as_dataset(True)
    dataset.info.description = category_description([2, 9])
    assert [annotation["category_id"] for annotation in coco_ground_truth(dataset)["annotations"]] == [9, 2]
