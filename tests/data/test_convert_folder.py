"""What a conversion leaves: the whole folder or nothing new; and data sets of the Hub as sources."""

import json
import os
import shutil

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from foreign_formats import write_yolo
from PIL import Image

from factories import write_shapes
from sim_hf.cli import main
from sim_hf.conversion import HubSource, SourceError, SourceImage, YoloSource, write_coco_folder
from sim_hf.data import category_ids, load_coco


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def yolo(tmp_path):
    return write_yolo(tmp_path / "yolo")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_conversion_leaves_what_was_there(yolo, tmp_path, monkeypatch, earlier):
    output, link, calls = tmp_path / "coco", os.link, []
    if earlier:
        write_coco_folder(YoloSource(yolo), output, progress=False)
    before, names = contents(output), sorted(path.name for path in tmp_path.iterdir())

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        link(*arguments)

    monkeypatch.setattr(os, "link", interrupted)
    assert main(["convert", "yolo", str(yolo), "--output", str(output), "--overwrite"]) == 130
    assert contents(output) == before and sorted(path.name for path in tmp_path.iterdir()) == names


def test_an_older_result_is_replaced_on_request_only(yolo, tmp_path):
    output = tmp_path / "coco"
    write_coco_folder(YoloSource(yolo), output, progress=False)
    (yolo / "images" / "train" / "d.png").unlink()
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        write_coco_folder(YoloSource(yolo), output, progress=False)
    write_coco_folder(YoloSource(yolo), output, overwrite=True, progress=False)
    assert not (output / "images" / "train" / "d.png").exists() and not list(tmp_path.glob(".coco*"))


def test_a_folder_of_another_origin_is_never_replaced(yolo, tmp_path):
    shapes = write_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    before = contents(shapes)
    (tmp_path / "file").write_text("years of work")
    write_coco_folder(YoloSource(yolo), tmp_path / "coco", progress=False)
    (tmp_path / "coco" / "thesis.tex").write_text("years of work")
    for output in (shapes, tmp_path / "file", tmp_path / "coco"):
        with pytest.raises(FileExistsError, match="choose another folder"):
            write_coco_folder(YoloSource(yolo), output, overwrite=True, progress=False)
    assert contents(shapes) == before and (tmp_path / "coco" / "thesis.tex").exists()


def test_an_empty_folder_may_be_the_output(yolo, tmp_path):
    (tmp_path / "coco").mkdir()
    write_coco_folder(YoloSource(yolo), tmp_path / "coco", progress=False)
    assert (tmp_path / "coco" / "instances_train.json").exists()
    if os.name == "posix":
        assert (tmp_path / "coco").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_names_that_leave_the_folder_are_refused(yolo, tmp_path):
    source = YoloSource(yolo)
    source.read = lambda split, entry: SourceImage("../../evil.png", entry[0], 40, 20)
    with pytest.raises(SourceError, match=r"evil\.png.*leaves the image folder"):
        write_coco_folder(source, tmp_path / "coco", progress=False)
    assert not list(tmp_path.rglob("evil.png"))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(yolo, tmp_path, share):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        write_coco_folder(YoloSource(yolo), tmp_path / "coco", val_fraction=share, progress=False)


def test_a_source_without_training_images_is_refused(yolo, tmp_path):
    source = YoloSource(yolo)
    source.splits = {"val": source.splits["val"]}
    with pytest.raises(SourceError, match="no images to train on"):
        write_coco_folder(source, tmp_path / "coco", progress=False)


def test_a_hub_data_set_comes_out_as_it_went_in(tmp_path):
    """Ids of the categories, boxes, crowds, pixels; masks in the validation file only."""
    shapes = write_shapes(tmp_path / "shapes", empty=(2,))
    splits = {
        name: load_coco(shapes / "images", shapes / f"instances_{split}.json", with_masks=True)
        for name, split in (("train", "train"), ("validation", "val"))
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    report = write_coco_folder(HubSource(str(tmp_path / "saved")), tmp_path / "coco", progress=False)
    assert "segmentation" not in (tmp_path / "coco" / "instances_train.json").read_text()
    for split, name in (("train", "train"), ("val", "validation")):
        document = json.loads((tmp_path / "coco" / f"instances_{split}.json").read_text())
        back = load_coco(tmp_path / "coco" / "images", tmp_path / "coco" / f"instances_{split}.json")
        assert category_ids(back) == category_ids(splits[name]) == [3, 8]
        for old, new, image in zip(splits[name], back, document["images"], strict=True):
            assert old["objects"]["bbox"] == new["objects"]["bbox"] and old["objects"]["category"] == new["objects"]["category"]
            assert old["image"].convert("RGB").tobytes() == new["image"].convert("RGB").tobytes()
            assert image["file_name"] == f"{split}/{old['image_id']}.png"
    assert report.splits["val"].num_masks == report.splits["val"].num_boxes > 0
    assert report.splits["train"].num_empty_images == 1


def test_a_data_set_without_a_validation_split_gets_one_with_its_masks(tmp_path):
    shapes = write_shapes(tmp_path / "shapes", num_train=4)
    load_coco(shapes / "images", shapes / "instances_train.json", with_masks=True).save_to_disk(tmp_path / "saved")
    arguments = ["convert", "hub", str(tmp_path / "saved"), "--val-split", "none", "--val-fraction", "0.5"]
    assert main([*arguments, "--output", str(tmp_path / "coco")]) == 0
    documents = {split: json.loads((tmp_path / "coco" / f"instances_{split}.json").read_text()) for split in ("train", "val")}
    assert [len(document["images"]) for document in documents.values()] == [2, 2]
    assert not any("segmentation" in annotation for annotation in documents["train"]["annotations"])
    assert all("segmentation" in annotation for annotation in documents["val"]["annotations"])


def test_images_that_have_no_name_get_one(tmp_path):
    objects = {"bbox": List(List(Value("float32"), length=4)), "category": List(ClassLabel(names=["zebra", "ant"]))}
    features = Features({"image": datasets.Image(), "objects": objects})
    rows = [{"image": Image.new("RGB", (30, 20)), "objects": {"bbox": [[1, 2, 3, 4]], "category": [1]}}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    arguments = ["convert", "hub", str(tmp_path / "saved"), "--val-split", "none", "--output", str(tmp_path / "coco")]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "coco" / "instances_train.json").read_text())
    assert document["images"] == [{"id": 1, "file_name": "train/000000000000.png", "width": 30, "height": 20}]
    assert document["categories"][1]["name"] == "ant" and document["annotations"][0]["bbox"] == [1, 2, 3, 4]


def test_classes_that_differ_between_the_splits_are_refused(tmp_path):
    def rows(names):
        objects = {"bbox": List(List(Value("float32"), length=4)), "category": List(ClassLabel(names=names))}
        row = {"image": Image.new("RGB", (30, 20)), "objects": {"bbox": [[1, 2, 3, 4]], "category": [0]}}
        return Dataset.from_list([row], features=Features({"image": datasets.Image(), "objects": objects}))

    DatasetDict({"train": rows(["zebra", "ant"]), "validation": rows(["zebra", "ant"])}).save_to_disk(tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "validation")
    rows(["ant", "zebra"]).save_to_disk(tmp_path / "both" / "validation")
    with pytest.raises(SourceError, match="the classes of validation are not those of train"):
        HubSource(str(tmp_path / "both"))
