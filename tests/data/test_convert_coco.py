"""COCO files in the layouts of other tools, as a data folder; what cannot be told is asked for."""

import json
import shutil

import datasets
import pytest
from PIL import Image

from coco_faults import all_files
from factories import write_shapes
from sim_hf.cli import main
from sim_hf.conversion import CocoSource, SourceError, write_coco_folder
from sim_hf.data import category_ids, load_coco
from sim_hf.demo import _as_data_folder
from sim_hf.training.arguments import DataArguments
from sim_hf.training.assembly import coco_folder


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def shapes(tmp_path):
    return write_shapes(tmp_path / "shapes", num_train=5, num_val=2, empty=(1,))


def move(shapes, folder, places):
    """A copy of the shapes: split -> (where its file is, where its images are)."""
    for split, (file, images) in places.items():
        document = json.loads((shapes / f"instances_{split}.json").read_text())
        (folder / images).mkdir(parents=True, exist_ok=True)
        for entry in document["images"]:
            shutil.copy(shapes / "images" / entry["file_name"], folder / images)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(document))
    return folder


LAYOUTS = {
    "roboflow": {"train": ("train/_annotations.coco.json", "train"), "val": ("valid/_annotations.coco.json", "valid")},
    "coco-2017": {
        "train": ("annotations/instances_train2017.json", "train2017"),
        "val": ("annotations/instances_val2017.json", "val2017"),
    },
    "coco-2017-images": {
        "train": ("annotations/instances_train2017.json", "images/train2017"),
        "val": ("annotations/instances_val2017.json", "images/val2017"),
    },
    "one-folder-of-images": {"train": ("train.json", "pictures"), "val": ("validation.json", "pictures")},
    "upper-case": {"train": ("Annotations/TRAIN.json", "JPEGImages"), "val": ("Annotations/VAL.json", "JPEGImages")},
    "sim_hf": {"train": ("instances_train.json", "images"), "val": ("instances_val.json", "images")},
}


def boxes_of(folder, split, images="images"):
    rows = load_coco(folder / images, folder / f"instances_{split}.json")
    return [(row["width"], row["height"], row["objects"]["bbox"], row["objects"]["category"]) for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_usual_layouts_are_found(shapes, tmp_path, layout):
    source = move(shapes, tmp_path / "data" / "train", LAYOUTS[layout])  # names above the source say nothing
    assert main(["convert", "coco", str(source), "--output", str(tmp_path / "coco")]) == 0
    for split in ("train", "val"):
        assert boxes_of(tmp_path / "coco", split) == boxes_of(shapes, split)
        rows = load_coco(tmp_path / "coco" / "images", tmp_path / "coco" / f"instances_{split}.json")
        assert category_ids(rows) == category_ids(load_coco(shapes / "images", shapes / f"instances_{split}.json"))
    assert "segmentation" not in (tmp_path / "coco" / "instances_train.json").read_text()
    assert all("segmentation" in a for a in json.loads((tmp_path / "coco" / "instances_val.json").read_text())["annotations"])


@pytest.mark.parametrize(
    ("file", "images"),
    [("annotations/instances_default.json", "images"), ("result.json", "images"), ("boxes.json", "."), ("a/boxes.json", "b/c")],
)
def test_one_file_is_split_on_request(shapes, tmp_path, capsys, file, images):
    source = move(shapes, tmp_path / "data", {"train": (file, images)})
    assert main(["convert", "coco", str(source), "--output", str(tmp_path / "all")]) == 0
    assert "there is no validation split; --val-fraction 0.1 draws one" in capsys.readouterr().out
    assert boxes_of(tmp_path / "all", "train") == boxes_of(shapes, "train")
    report = write_coco_folder(CocoSource(source), tmp_path / "coco", val_fraction=0.4, progress=False)
    assert {split: counts.num_images for split, counts in report.splits.items()} == {"train": 3, "val": 2}
    assert report.splits["val"].num_masks == report.splits["val"].num_boxes


def test_a_file_is_converted_beside_itself(shapes, tmp_path, monkeypatch):
    source = move(shapes, tmp_path / "data", {"train": ("boxes.json", "photos"), "val": ("more.json", "others")})
    monkeypatch.chdir(source)
    assert main(["convert", "coco", "boxes.json", "--val", "more.json", "--output", "coco"]) == 0
    assert boxes_of(source / "coco", "val") == boxes_of(shapes, "val")
    named = ["--images", "photos", "--val", "more.json", "--val-images", "others", "--output", "coco", "--overwrite"]
    assert main(["convert", "coco", "boxes.json", *named]) == 0
    assert boxes_of(source / "coco", "train") == boxes_of(shapes, "train")


def test_images_of_the_same_names_are_those_of_the_split(shapes, tmp_path):
    source = move(
        shapes,
        tmp_path / "data",
        {"train": ("annotations/train.json", "images/train"), "val": ("annotations/val.json", "images/val")},
    )
    for path in list((source / "images").rglob("100*.png")):  # 1.png, 2.png in both
        path.rename(path.with_name(f"{int(path.stem) % 1000}.png"))
    for split in ("train", "val"):
        file = source / "annotations" / f"{split}.json"
        document = json.loads(file.read_text())
        for entry in document["images"]:
            entry["file_name"] = f"{entry['id'] % 1000}.png"
        file.write_text(json.dumps(document))
    found = CocoSource(source)
    assert [found.files[split].images.name for split in ("train", "val")] == ["train", "val"]


def test_names_with_folders_stay(shapes, tmp_path):
    source = move(shapes, tmp_path / "data", {"train": ("boxes.json", "images/a")})
    document = json.loads((source / "boxes.json").read_text())
    document["images"] = [{**entry, "file_name": f"a/{entry['file_name']}"} for entry in document["images"]]
    (source / "boxes.json").write_text(json.dumps(document))
    write_coco_folder(CocoSource(source), tmp_path / "coco", progress=False)
    assert (tmp_path / "coco" / "images" / "train" / "a" / "1.png").is_file()


def test_a_placeholder_class_is_left_out_and_named(shapes, tmp_path, capsys):
    source = move(shapes, tmp_path / "data", LAYOUTS["roboflow"])
    for file in source.glob("*/*.json"):
        document = json.loads(file.read_text())
        names = [{**entry, "supercategory": "all-shapes"} for entry in document["categories"]]
        document["categories"] = [{"id": 0, "name": "all-shapes", "supercategory": "none"}, *names]
        file.write_text(json.dumps(document))
    (source / "test").mkdir()
    shutil.copy(source / "valid" / "_annotations.coco.json", source / "test")
    assert main(["convert", "coco", str(source), "--output", str(tmp_path / "coco")]) == 0
    said = capsys.readouterr().out
    assert "1 class without objects was left out, the supercategory of others: all-shapes" in said
    assert "1 file was not converted: test/_annotations.coco.json" in said
    assert boxes_of(tmp_path / "coco", "train") == boxes_of(shapes, "train")


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (
            {"train": ("a.json", "images"), "val": ("b.json", "images")},
            "0 of these COCO files are for train: a.json, b.json",
        ),
        ({"train": ("train-a.json", "i"), "val": ("train-b.json", "i")}, "2 of these COCO files are for train: train-a.json"),
        ({}, "it has no COCO file; name them: sim-hf convert coco TRAIN.json"),
    ],
)
def test_what_cannot_be_told_is_asked_for(shapes, tmp_path, places, says):
    (tmp_path / "data").mkdir()
    source = move(shapes, tmp_path / "data", places)
    (source / "package.json").write_text('{"name": "no COCO file"}')
    with pytest.raises(SourceError, match=says):
        CocoSource(source)


def test_images_that_are_nowhere_are_named(shapes, tmp_path):
    source = move(shapes, tmp_path / "data", {"train": ("boxes.json", "images")})
    shutil.rmtree(source / "images")
    with pytest.raises(SourceError, match=r"its image '1\.png' was found nowhere below"):
        CocoSource(source)


def test_a_class_of_the_validation_file_alone_is_refused(shapes, tmp_path):
    source = move(shapes, tmp_path / "data", LAYOUTS["sim_hf"])
    document = json.loads((source / "instances_val.json").read_text())
    document["categories"].append({"id": 99, "name": "comet"})
    (source / "instances_val.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match="class 'comet' is not a class of"):
        CocoSource(source)


def test_a_folder_or_a_file_not_both(shapes, tmp_path):
    with pytest.raises(ValueError, match="is a folder, in which files and images are found"):
        CocoSource(shapes, images=shapes / "images")
    with pytest.raises(ValueError, match="val_images is the folder of val"):
        CocoSource(shapes / "instances_train.json", val_images=shapes / "images")


def test_training_names_the_command_and_the_demo_makes_the_folder(shapes, tmp_path, capsys):
    source = move(shapes, tmp_path / "data", LAYOUTS["roboflow"])
    with pytest.raises(FileNotFoundError, match=f"sim-hf convert coco {source} --output FOLDER"):
        coco_folder(source)
    whole = DataArguments(data=[str(shapes)])
    assert _as_data_folder(whole, tmp_path / "unused") is whole
    for name, folder in (("layout", source), ("without-val", move(shapes, tmp_path / "bare", {"train": ("a.json", "images")}))):
        data = _as_data_folder(DataArguments(data=[str(folder)], mosaic=0.3), tmp_path / name)
        assert data.data == [str(tmp_path / name)] and data.mosaic == 0.3
        assert coco_folder(tmp_path / name)["val"].exists()
    assert "data: 4 images for train and 1 images for val, made of the COCO files in" in capsys.readouterr().out


@pytest.mark.parametrize("fault", all_files(), ids=str)
def test_a_faulty_file_is_converted_as_the_check_says(tmp_path, fault):
    (tmp_path / "images").mkdir()
    third = (9, 9) if fault.name == "image-without-annotations" else (100, 80)
    for number, size in ((1, (100, 80)), (2, (100, 80)), (3, third)):
        Image.new("RGB", size).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "boxes.json").write_bytes(fault.content)
    convert = ["convert", "coco", str(tmp_path / "boxes.json"), "--output", str(tmp_path / "coco")]
    assert main(convert) == (2 if fault.verdict in ("refused", "unreadable") else 0)
