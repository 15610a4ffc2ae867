"""`sim-hf convert voc`: the devkit with its splits and masks, trees of other tools, and XML that means no good."""

import json

import numpy as np
import pytest
from foreign_formats import picture, voc_xml, write_devkit, write_palette, write_text

from sim_hf.cli import main
from sim_hf.conversion import SourceError, VocSource, write_coco_folder
from sim_hf.conversion.voc_xml import read_xml
from sim_hf.data import decode_segmentation, validate_coco


def convert(source, output, **options):
    report = write_coco_folder(VocSource(source, **options), output, progress=False)
    files = {split: output / f"instances_{split}.json" for split in ("train", "val")}
    return report, {split: json.loads(file.read_text()) for split, file in files.items() if file.exists()}


def objects_of(document):
    """file stem -> [(class, annotation)]"""
    names = {category["id"]: category["name"] for category in document["categories"]}
    stems = {image["id"]: image["file_name"].rpartition("/")[2].partition(".")[0] for image in document["images"]}
    found = {stem: [] for stem in stems.values()}
    for annotation in document["annotations"]:
        found[stems[annotation["image_id"]]].append((names[annotation["category_id"]], annotation))
    return found


@pytest.fixture
def devkit(tmp_path):
    return write_devkit(tmp_path / "VOC2012")


def test_the_papers_protocol_is_the_default_of_a_devkit_with_masks(devkit, tmp_path):
    """Boxes of all annotated images that are not measured on; masks of Segmentation/val, in the validation file only."""
    report, documents = convert(devkit, tmp_path / "voc")
    assert set(objects_of(documents["train"])) == {"t1", "t2", "t3"} and set(objects_of(documents["val"])) == {"m1", "m2"}
    assert "segmentation" not in (tmp_path / "voc" / "instances_train.json").read_text()
    assert all("segmentation" in annotation for annotation in documents["val"]["annotations"])
    assert report.splits["val"].num_masks == 3
    for split in ("train", "val"):
        checked = validate_coco(
            tmp_path / "voc" / f"instances_{split}.json", tmp_path / "voc" / "images", with_masks=split == "val"
        )
        assert not [finding for finding in checked.findings if finding.severity != "note"], str(checked)


def test_the_augmented_list_is_taken_where_it_is(devkit, tmp_path):
    write_text(devkit / "ImageSets" / "SegmentationAug" / "train_aug.txt", "t3\n")
    _, documents = convert(devkit, tmp_path / "voc")
    assert set(objects_of(documents["train"])) == {"t3"}


def test_boxes_are_pixels_counted_from_one_and_flags_survive(devkit, tmp_path):
    _, documents = convert(devkit, tmp_path / "voc")
    (first, dog), (second, cat) = objects_of(documents["train"])["t1"]
    assert (first, dog["bbox"], dog["area"]) == ("dog", [0, 0, 40, 20], 800)
    assert (dog["difficult"], dog["truncated"], dog["pose"]) == (1, 1, "Left") and dog["iscrowd"] == 0
    assert (second, cat["bbox"], cat["difficult"]) == ("cat", [10, 5, 10, 10], 0) and "truncated" not in cat
    assert objects_of(documents["train"])["t2"] == []


def test_classes_have_the_order_of_voc(devkit, tmp_path):
    _, documents = convert(devkit, tmp_path / "voc")
    assert [category["name"] for category in documents["train"]["categories"]] == ["cat", "dog", "person"]
    assert documents["train"]["categories"] == documents["val"]["categories"]


def test_masks_are_the_pixels_of_the_object_without_its_border(devkit, tmp_path):
    _, documents = convert(devkit, tmp_path / "voc")
    (name, dog), (_, person) = objects_of(documents["val"])["m1"]
    mask = decode_segmentation(dog["segmentation"], 20, 40)
    assert name == "dog" and mask[3:11, 5:13].all() and mask.sum() == 64 == dog["area"]
    assert dog["bbox"] == [4, 2, 10, 10]  # the XML's: the border around the object is in it
    assert decode_segmentation(person["segmentation"], 20, 40)[3:11, 21:29].all()


def test_evaluation_measures_masks(devkit, tmp_path):
    from sim_hf.evaluation.ground_truth import coco_ground_truth

    convert(devkit, tmp_path / "voc")
    truth = coco_ground_truth(tmp_path / "voc" / "instances_val.json")
    assert truth["has_masks"] and len(truth["annotations"]) == 3


def test_a_mask_of_another_class_stands_for_itself_and_its_object_is_ignored(devkit, tmp_path):
    write_text(devkit / "Annotations" / "m2.xml", voc_xml([("dog", (20, 1, 30, 10), "")]))
    report, documents = convert(devkit, tmp_path / "voc")
    (first, cat), (second, dog) = objects_of(documents["val"])["m2"]
    assert (first, cat["bbox"], cat["area"], cat["iscrowd"]) == ("cat", [0, 0, 10, 10], 100, 0)
    assert (second, dog["bbox"], dog["iscrowd"]) == ("dog", [19, 0, 11, 10], 1) and "segmentation" not in dog
    assert sorted(count for text, count in report.notes.items() if "mask" in text and "images" not in text) == [1, 1]


def test_more_masks_than_objects_need_the_class_image(devkit, tmp_path):
    write_text(devkit / "Annotations" / "m2.xml", voc_xml([]))
    _, documents = convert(devkit, tmp_path / "voc")
    assert [name for name, _ in objects_of(documents["val"])["m2"]] == ["cat"]
    (devkit / "SegmentationClass" / "m2.png").unlink()
    with pytest.raises(SourceError, match=r"m2\.png: pixels of value 1, but the XML file has 0 objects"):
        convert(devkit, tmp_path / "again")


def test_lists_can_be_chosen(devkit, tmp_path):
    report, documents = convert(devkit, tmp_path / "voc", train="Main/trainval", val="Main/val")
    assert set(objects_of(documents["val"])) == {"t3", "m2"} and set(objects_of(documents["train"])) == {"t1", "t2"}
    assert report.notes["images of the training list are measured on, and not trained on"] == 2
    assert report.notes["validation images have no mask file, so the validation file has boxes only"] == 1
    assert "segmentation" not in (tmp_path / "voc" / "instances_val.json").read_text()
    with pytest.raises(SourceError, match=r"Main/nothing\.txt: the list of images cannot be read"):
        VocSource(devkit, train="Main/nothing")


@pytest.mark.parametrize(("difficult", "dogs"), [("keep", [0]), ("ignore", [1]), ("drop", [])])
def test_difficult_objects(devkit, tmp_path, difficult, dogs):
    _, documents = convert(devkit, tmp_path / "voc", difficult=difficult)
    assert [annotation["iscrowd"] for name, annotation in objects_of(documents["train"])["t1"] if name == "dog"] == dogs


def test_folders_of_pictures_with_xml_beside_them(tmp_path):
    """Roboflow's train/ and valid/, labelImg's one folder; classes in alphabetical order, pictures without XML left out."""
    for split, name in (("train", "zebra"), ("valid", "ant")):
        picture(tmp_path / "export" / split / "a.png")
        picture(tmp_path / "export" / split / "unlabelled.png")
        write_text(tmp_path / "export" / split / "a.xml", voc_xml([(name, (1, 1, 10, 10), "")]))
    report, documents = convert(tmp_path / "export", tmp_path / "coco")
    assert report.class_names == ["ant", "zebra"] and list(objects_of(documents["val"])) == ["a"]
    assert report.notes["images have no XML file and were left out"] == 2
    report, documents = convert(tmp_path / "export" / "train", tmp_path / "one")
    assert list(documents) == ["train"] and report.class_names == ["zebra"]


def test_annotations_and_images_in_two_folders_and_a_list_of_classes(tmp_path):
    picture(tmp_path / "export" / "images" / "a.png")
    write_text(tmp_path / "export" / "Annotations" / "a.xml", voc_xml([("zebra", (1, 1, 10, 10), "")]))
    write_text(tmp_path / "export" / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:::\nzebra:::\nant:1,2,3::\n")
    report, _ = convert(tmp_path / "export", tmp_path / "coco")
    assert report.class_names == ["zebra", "ant"]
    write_text(tmp_path / "export" / "Annotations" / "a.xml", voc_xml([("cow", (1, 1, 10, 10), "")]))
    with pytest.raises(SourceError, match=r"a\.xml: class 'cow' is not in labelmap\.txt"):
        convert(tmp_path / "export", tmp_path / "again")


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
SIZE = "<size><width>40</width><height>20</height></size>"


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (f"<annotation>\n<object><name>a</name>{BOX}</object></annotation>", r"a\.xml:1: no <size> in <annotation>"),
        ("<annotation>\n<size><width>40</width></size></annotation>", r"a\.xml:2: no <height> in <size>"),
        ("<annotation><size><width>0</width><height>0</height></size></annotation>", r"<size> is 0 x 0, but a\.png is 40 x 20"),
        ("<annotation><size><width>20</width><height>40</height></size></annotation>", "<size> is 20 x 40"),
        (f"<annotation>{SIZE}\n\n<object>{BOX}</object></annotation>", r"a\.xml:3: no <name> in <object>"),
        (f"<annotation>{SIZE}<object><name> </name>{BOX}</object></annotation>", "<name> is empty"),
        (f"<annotation>{SIZE}\n<object><name>a</name></object></annotation>", r"a\.xml:2: no <bndbox>"),
        (
            f"<annotation>{SIZE}<object><name>a</name>\n{BOX.replace('<xmin>1', '<xmin>one')}</object></annotation>",
            r"a\.xml:2: <xmin> must be a number, got 'one'",
        ),
        (
            f"<annotation>{SIZE}<object><name>a</name>{BOX.replace('<xmin>1', '<xmin>nan')}</object></annotation>",
            "number, got 'nan'",
        ),
        (f"<annotation>{SIZE}<object><name>a</name>{BOX.replace('<xmin>1', '<xmin>12')}</object></annotation>", "ends before it"),
        ("<annotation>\n<size>\n</annotation>", r"a\.xml:3: not XML \(mismatched tag\)"),
        ("", "not XML"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "not XML"),
    ],
)
def test_faults_name_file_and_line(xml, message, tmp_path):
    picture(tmp_path / "export" / "a.png")
    write_text(tmp_path / "export" / "a.xml", xml)
    with pytest.raises(SourceError, match=message):
        convert(tmp_path / "export", tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>',  # grows
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',  # reads a file
        '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">',  # asks a server
    ],
)
def test_documents_that_declare_a_type_or_entities_are_refused(declaration, tmp_path):
    file = write_text(tmp_path / "a.xml", f"<?xml version='1.0'?>\n{declaration}\n<annotation>&x;</annotation>")
    with pytest.raises(SourceError, match=r"a\.xml:2: a document type or entity is declared"):
        read_xml(file)


def test_deep_nesting_does_not_exhaust_the_stack(tmp_path):
    depth = 20_000
    root = read_xml(write_text(tmp_path / "a.xml", "<a>" * depth + "</a>" * depth))
    assert root.tag == "a" and len(root.children) == 1


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        (np.zeros((10, 10)), "P", r"10 x 10 pixels, but the picture is 40 x 20"),
        (np.zeros((20, 40)), "RGB", "expected a palette or gray PNG"),
    ],
)
def test_masks_that_are_none_are_named(devkit, tmp_path, values, mode, message):
    from PIL import Image

    path = write_palette(devkit / "SegmentationObject" / "m2.png", values)
    if mode != "P":
        Image.open(path).convert(mode).save(path)
    with pytest.raises(SourceError, match=rf"m2\.png: {message}"):
        convert(devkit, tmp_path / "voc")


def test_missing_pictures_and_xml_files_are_named(devkit, tmp_path):
    (devkit / "JPEGImages" / "t1.jpg").unlink()
    (devkit / "Annotations" / "m1.xml").unlink()
    with pytest.raises(SourceError, match=r"t1\.xml: no picture t1 .*m1\.xml: cannot be read"):
        convert(devkit, tmp_path / "voc")


def test_supervision_reads_the_same_boxes(devkit, tmp_path):
    supervision = pytest.importorskip("supervision", reason="compares with supervision's reader, where that is installed")
    _, documents = convert(devkit, tmp_path / "voc")
    theirs = supervision.DetectionDataset.from_pascal_voc(str(devkit / "JPEGImages"), str(devkit / "Annotations"))
    ours = {**objects_of(documents["train"]), **objects_of(documents["val"])}
    for path, _, found in theirs:
        stem = path.rpartition("/")[2].partition(".")[0]
        boxes = [[x, y, x + w, y + h] for _, annotation in ours[stem] for x, y, w, h in [annotation["bbox"]]]
        assert found.xyxy.tolist() == boxes
        assert [theirs.classes[label] for label in found.class_id] == [name for name, _ in ours[stem]]


def test_the_command(devkit, tmp_path, capsys):
    output = tmp_path / "voc"
    assert main(["convert", "voc", str(devkit), "--output", str(output), "--difficult", "drop"]) == 0
    shown = capsys.readouterr().out
    assert "val: 2 images (0 without objects), 3 boxes, 3 masks" in shown and "note: 1 difficult objects were left out" in shown
    assert main(["check", str(output / "instances_val.json"), "--images", str(output / "images"), "--masks"]) == 0
    write_text(devkit / "Annotations" / "t1.xml", "<annotation></annotation>")
    assert main(["convert", "voc", str(devkit), "--output", str(tmp_path / "other")]) == 2
    assert "t1.xml:1: no <size>" in capsys.readouterr().err and not (tmp_path / "other").exists()
