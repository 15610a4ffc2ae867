"""`sim-hf convert yolo`: what stands in the rows, in COCO's words; and every fault with its file and line."""

import json
import os

import pytest
from foreign_formats import NAMES, picture, write_text, write_yolo

from sim_hf.cli import main
from sim_hf.conversion import SourceError, YoloSource, write_coco_folder
from sim_hf.conversion.yolo import parse_row
from sim_hf.data import validate_coco


def convert(source, output, **options):
    report = write_coco_folder(YoloSource(source), output, progress=False, **options)
    documents = {
        split: json.loads((output / f"instances_{split}.json").read_text())
        for split in ("train", "val")
        if (output / f"instances_{split}.json").exists()
    }
    return report, documents


def boxes_of(document):
    """file name -> [(class name, box)]"""
    names = {category["id"]: category["name"] for category in document["categories"]}
    found = {image["file_name"]: [] for image in document["images"]}
    files = {image["id"]: image["file_name"] for image in document["images"]}
    for annotation in document["annotations"]:
        found[files[annotation["image_id"]]].append((names[annotation["category_id"]], annotation["bbox"]))
    return found


def test_rows_become_boxes_in_pixels_and_images_without_objects_stay(tmp_path):
    report, documents = convert(write_yolo(tmp_path / "yolo"), tmp_path / "coco")
    assert [category["name"] for category in documents["train"]["categories"]] == NAMES == report.class_names
    assert boxes_of(documents["train"]) == {
        "train/a.png": [("cow", [10, 5, 20, 10]), ("zebra", [0, 0, 20, 20])],
        "train/b.png": [("ant", [pytest.approx(4), pytest.approx(4), pytest.approx(32), pytest.approx(12)])],
        "train/d.png": [],
        "train/deep/c.png": [],
    }
    assert boxes_of(documents["val"]) == {"val/e.png": [("ant", [12, 12, 8, 8])]}
    counts = report.splits["train"]
    assert (counts.num_images, counts.num_boxes, counts.num_empty_images) == (4, 3, 2)
    assert sum(count for text, count in report.notes.items() if text.startswith("polygons became boxes")) == 1
    assert "segmentation" not in (tmp_path / "coco" / "instances_train.json").read_text()


def test_the_result_is_clean_and_ids_differ_through_all_splits(tmp_path):
    _, documents = convert(write_yolo(tmp_path / "yolo"), tmp_path / "coco")
    for split in ("train", "val"):
        report = validate_coco(tmp_path / "coco" / f"instances_{split}.json", tmp_path / "coco" / "images", images="decode")
        assert not [finding for finding in report.findings if finding.severity != "note"], str(report)
    for kind in ("images", "annotations"):
        ids = [record["id"] for document in documents.values() for record in document[kind]]
        assert len(set(ids)) == len(ids) and min(ids) == 1


def test_the_source_is_left_alone_and_images_are_linked_or_copied(tmp_path):
    source = write_yolo(tmp_path / "yolo")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    linked, _ = convert(source, tmp_path / "linked")
    copied, _ = convert(source, tmp_path / "copied", copy=True)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    original = source / "images" / "train" / "a.png"
    assert linked.linked and os.path.samefile(tmp_path / "linked" / "images" / "train" / "a.png", original)
    copy = tmp_path / "copied" / "images" / "train" / "a.png"
    assert not copied.linked and not os.path.samefile(copy, original) and copy.read_bytes() == original.read_bytes()


def test_where_links_cannot_be_made_images_are_copied(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    report, _ = convert(write_yolo(tmp_path / "yolo"), tmp_path / "coco")
    assert not report.linked and (tmp_path / "coco" / "images" / "train" / "a.png").is_file()


@pytest.mark.parametrize(
    ("row", "label", "box"),
    [
        ("1 0.5 0.5 0.2 0.4", 1, (0.4, 0.3, 0.2, 0.4)),
        ("1.0 0.5 0.5 0.2 0.4", 1, (0.4, 0.3, 0.2, 0.4)),  # written as a float by some tools
        ("0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6", 0, (0.1, 0.2, 0.2, 0.4)),  # a turned box, or a polygon of four corners
    ],
)
def test_a_row_is_a_box_or_a_polygon(row, label, box):
    parsed = parse_row(row, 2)
    assert parsed.label == label and parsed.box == pytest.approx(box)


def test_keypoints_are_left_out():
    assert parse_row("0 0.5 0.5 0.2 0.4 0.1 0.1 2 0.2 0.2 1", 1, 6).box == pytest.approx((0.4, 0.3, 0.2, 0.4))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0 0.5 0.5 0.2", "3 numbers after the class, expected a box or a polygon"),
        ("0 0.5 0.5 0.2 0.2 0.9", "is the last one a confidence"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "7 numbers after the class"),
        ("x 0.5 0.5 0.2 0.2", "could not convert string to float: 'x'"),
        ("0 0.5 0.5 nan 0.2", "finite numbers"),
        ("0 120 80 40 40", "is in pixels"),
        ("2 0.5 0.5 0.2 0.2", r"class 2 is not among the 2 classes 0\.\.1"),
        ("-1 0.5 0.5 0.2 0.2", "class -1"),
        ("0.5 0.5 0.5 0.2 0.2", r"class 0\.5"),
    ],
)
def test_what_is_no_row_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        parse_row(row, 2)


def test_faults_name_their_files_and_lines_all_at_once_and_nothing_is_left(tmp_path):
    source = write_yolo(tmp_path / "yolo")
    write_text(source / "labels" / "train" / "a.txt", "0 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n")
    write_text(source / "labels" / "val" / "e.txt", "\n\n0 0.5\n")
    with pytest.raises(SourceError, match=r"2 image.s. cannot.*train/a\.txt:2: class 7 .*val/e\.txt:3: 1 numbers after"):
        convert(source, tmp_path / "coco")
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images/train\n", r"data\.yaml: no `names`"),
        ("names: [a, b, c]\n", r"data\.yaml: no `train`"),
        ("train: images/train\nnames: {0: a, 2: b, 3: c}\n", r"must number the classes 0\.\.2, got \[0, 2, 3\]"),
        ("train: images/train\nnames: [a, a, c]\n", "must differ"),
        ("train: images/train\nnames: [a, b, c]\nnc: 4\n", "nc is 4, but `names` has 3"),
        ("train: images/nowhere\nnames: [a, b, c]\n", "images/nowhere does not exist"),
        ("train: labels\nnames: [a, b, c]\n", "holds no images"),
        ("- a\n- b\n", "expected a mapping"),
        ("names: [a\n", "cannot be read as YAML"),
        ("train: images/train\nnames: [a, b, c]\nkpt_shape: 17\n", "kpt_shape"),
    ],
)
def test_a_description_that_says_too_little_is_refused(yaml, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        YoloSource(write_yolo(tmp_path / "yolo", yaml=yaml))


def test_class_names_are_taken_as_they_are_written(tmp_path):
    """Not as YAML would have them: no is a word, and 007 is no 7."""
    source = YoloSource(write_yolo(tmp_path / "yolo", yaml="train: images/train\nnames: [no, 007, null]\nnc: 3\n"))
    assert source.names == ["no", "007", "null"]


@pytest.mark.parametrize(
    "yaml",
    [
        "a: &a [x, x, x]\nb: &b [*a, *a, *a]\ntrain: images/train\nnames: [*b, *b]\n",  # nine levels of it fill the memory
        "names: " + "[" * 5000,
        "names: [[a, b], c]\ntrain: images/train\n",
    ],
)
def test_hostile_yaml_is_refused(yaml, tmp_path):
    with pytest.raises(SourceError, match=r"data\.yaml: (cannot be read as YAML|`names` must list)"):
        YoloSource(write_yolo(tmp_path / "yolo", yaml=yaml))


def test_a_folder_without_a_description_is_refused(tmp_path):
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(SourceError, match=r"no data\.yaml and no classes\.txt or obj\.names"):
        YoloSource(tmp_path)


def test_images_without_any_text_file_are_another_layout(tmp_path):
    source = write_yolo(tmp_path / "yolo")
    (source / "labels" / "val" / "e.txt").unlink()
    with pytest.raises(SourceError, match=r"val: none of its 1 images has a text file; one was expected as .*labels/val/e\.txt"):
        YoloSource(source)


def test_exports_that_count_from_a_folder_that_is_not_there(tmp_path):
    """Roboflow: ../train/images, which is train/images; and `valid` for the validation images."""
    for split in ("train", "valid"):
        picture(tmp_path / "export" / split / "images" / "a.png")
        write_text(tmp_path / "export" / split / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5")
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: ['thing']\n"
    write_text(tmp_path / "export" / "data.yaml", yaml)
    report, documents = convert(tmp_path / "export", tmp_path / "coco")
    assert documents["val"]["images"][0]["file_name"] == "val/a.png" and report.notes["split was not converted: test"] == 1


def test_lists_of_images_and_several_folders(tmp_path):
    source = write_yolo(tmp_path / "yolo")
    write_text(source / "train.txt", "./images/train/a.png\nimages/train/b.png\n")
    write_text(source / "data.yaml", f"train: train.txt\nval: [images/val, images/train/deep]\nnames: {NAMES}\n")
    _, documents = convert(source, tmp_path / "coco")
    assert list(boxes_of(documents["train"])) == ["train/a.png", "train/b.png"]
    assert list(boxes_of(documents["val"])) == ["val/e.png", "val/c.png"]
    write_text(source / "train.txt", "images/train/a.png\nimages/train/missing.png\n")
    with pytest.raises(SourceError, match=r"train\.txt:2: images/train/missing\.png does not exist"):
        YoloSource(source)


def test_a_list_of_class_names_is_enough_and_equal_file_names_are_told_apart(tmp_path):
    """Label Studio's export, and labelImg's text files beside the pictures."""
    for folder in ("one", "two"):
        picture(tmp_path / "yolo" / folder / "a.png")
        write_text(tmp_path / "yolo" / folder / "a.txt", "1 0.5 0.5 0.5 0.5")
    write_text(tmp_path / "yolo" / "classes.txt", "cat\ndog\n")
    report, documents = convert(tmp_path / "yolo", tmp_path / "coco")
    assert report.class_names == ["cat", "dog"]
    assert boxes_of(documents["train"]) == {f"train/{name}/a.png": [("dog", [10, 5, 20, 10])] for name in ("one", "two")}
    write_text(tmp_path / "yolo" / "data.yaml", "train: [one, two]\nnames: [cat, dog]\n")
    _, documents = convert(tmp_path / "yolo", tmp_path / "again")
    assert list(boxes_of(documents["train"])) == ["train/a.png", "train/a-2.png"]


def test_boxes_that_do_not_fit_are_cut_or_left_out_and_counted(tmp_path):
    source = write_yolo(tmp_path / "yolo")
    rows = [
        "0 0.9 0.5 0.4 0.5",
        "0 0.5 0.5 0 0.2",
        "0 1.4 1.4 0.2 0.2",
        "1 0.5 0.5 0.2 0.2",
        "1 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 -0.1 0.1",
    ]
    write_text(source / "labels" / "train" / "a.txt", "\n".join(rows))
    write_text(source / "labels" / "train" / "nobody.txt", "0 0.5 0.5 0.1 0.1")
    report, documents = convert(source, tmp_path / "coco")
    found = boxes_of(documents["train"])["train/a.png"]
    assert found == [("zebra", pytest.approx([28, 5, 12, 10])), ("ant", pytest.approx([16, 8, 8, 4]))]
    words = ("cut off", "without width", "wholly outside", "given twice", "negative", "belong to no image")
    for word in words:
        assert [count for text, count in report.notes.items() if word in text] == [1], word


def test_a_broken_picture_is_named(tmp_path):
    source = write_yolo(tmp_path / "yolo")
    write_text(source / "images" / "train" / "b.png", "not a picture")
    with pytest.raises(SourceError, match=r"train/b\.png: the header cannot be read"):
        convert(source, tmp_path / "coco")


def test_a_photograph_that_lies_on_its_side_is_measured_upright(tmp_path):
    from PIL import Image

    source = write_yolo(tmp_path / "yolo")
    turned = Image.new("RGB", (32, 64))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(source / "images" / "train" / "a.png", exif=exif)
    _, documents = convert(source, tmp_path / "coco")
    assert (documents["train"]["images"][0]["width"], documents["train"]["images"][0]["height"]) == (64, 32)
    assert boxes_of(documents["train"])["train/a.png"][0] == ("cow", [16, 8, 32, 16])


def test_a_part_of_the_training_images_can_be_measured_on(tmp_path):
    source = write_yolo(tmp_path / "yolo", yaml=f"train: images/train\nnames: {NAMES}\n")
    _, documents = convert(source, tmp_path / "coco", val_fraction=0.25)
    files = {split: set(boxes_of(document)) for split, document in documents.items()}
    assert len(files["train"]) == 3 and len(files["val"]) == 1
    _, again = convert(source, tmp_path / "again", val_fraction=0.25)
    assert again == documents


def test_supervision_reads_the_same_boxes(tmp_path):
    supervision = pytest.importorskip("supervision", reason="compares with supervision's reader, where that is installed")
    source = write_yolo(tmp_path / "yolo")
    (source / "images" / "train" / "deep" / "c.png").unlink()
    _, documents = convert(source, tmp_path / "coco")
    theirs = supervision.DetectionDataset.from_yolo(
        str(source / "images" / "train"), str(source / "labels" / "train"), str(source / "data.yaml")
    )
    assert theirs.classes == NAMES
    ours = boxes_of(documents["train"])
    for path, _, found in theirs:
        boxes = [[x, y, x + w, y + h] for _, (x, y, w, h) in ours[f"train/{os.path.basename(path)}"]]
        assert found.xyxy.tolist() == [pytest.approx(box, abs=1e-4) for box in boxes]


def test_the_command_prints_what_it_did_and_what_comes_next(tmp_path, capsys):
    source, output = write_yolo(tmp_path / "yolo"), tmp_path / "my coco"
    assert main(["convert", "yolo", str(source), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "train: 4 images (2 without objects), 3 boxes" in shown and "3 classes: zebra, ant, cow" in shown
    assert f"next: sim-hf train --data '{output}'" in shown
    assert main(["check", str(output / "instances_train.json"), "--images", str(output / "images")]) == 0
    assert main(["convert", "yolo", str(source), "--output", str(output)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(["convert", "yolo", str(source / "data.yaml"), "--output", str(source / "coco")]) == 2
    assert "choose another folder" in capsys.readouterr().err
