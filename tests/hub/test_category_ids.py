"""The ids that classes have in an annotation file (COCO's have gaps) survive a data set on the Hub."""

import json

import datasets
import pytest

from factories import CATEGORY_IDS, NAMES
from sim_hf.conversion import HubSource, write_coco_folder
from sim_hf.data import category_ids, load_detection_dataset
from sim_hf.data.category_ids import category_feature
from sim_hf.evaluation.ground_truth import coco_ground_truth
from sim_hf.hub import coco_dataset, push_dataset


@pytest.fixture
def pushed(hub, shapes, tmp_path):
    """ann/boxes, and ann/masks with scores, whose columns are more than the convention's."""
    document = json.loads((shapes / "instances_val.json").read_text())
    for annotation in document["annotations"]:
        annotation["score"] = 0.5
    labelled = tmp_path / "labelled.json"
    labelled.write_text(json.dumps(document))
    boxes = coco_dataset(shapes / "images", shapes / "instances_train.json", cache_dir=tmp_path)
    masks = coco_dataset(shapes / "images", labelled, with_masks=True, cache_dir=tmp_path)
    push_dataset({"train": boxes, "validation": boxes.select(range(2))}, "ann/boxes")
    push_dataset({"train": masks}, "ann/masks")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["ann/boxes", "ann/masks"])
def test_ids_come_back(pushed, name, streaming):
    rows = load_detection_dataset(name, "train", streaming)
    assert category_ids(rows) == list(CATEGORY_IDS) and category_feature(rows).names == list(NAMES)


def test_results_are_measured_in_the_ids_of_the_file(pushed):
    truth = coco_ground_truth(load_detection_dataset("ann/boxes", "validation"))
    assert {annotation["category_id"] for annotation in truth["annotations"]} <= set(CATEGORY_IDS)


def test_the_datasets_library_reads_the_set_without_us(pushed):
    assert datasets.load_dataset("ann/masks", split="train").features["objects"]["category"].feature.names == list(NAMES)


def test_a_converted_data_set_has_them_too(pushed, tmp_path):
    write_coco_folder(HubSource("ann/boxes"), tmp_path / "coco", progress=False)
    document = json.loads((tmp_path / "coco" / "instances_val.json").read_text())
    assert [(category["id"], category["name"]) for category in document["categories"]] == list(
        zip(CATEGORY_IDS, NAMES, strict=True)
    )
