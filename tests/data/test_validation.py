"""The check of COCO files: every corrupted file of `coco_faults` gets its verdict, and a sound file none."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from coco_faults import ALL_FAULTS, ESCAPING_NAMES, GARBAGE_SEGMENTATIONS, encode, sound_document
from sim_hf.data.annotation_file import AnnotationError
from sim_hf.data.coco import load_coco
from sim_hf.data.validation import validate_coco
from sim_hf.data.validation_report import FAULTS, NUM_EXAMPLES, ValidationReport

SEVERITY = {"unreadable": "error", "refused": "error", "repaired": "warning", "noted": "note"}
EXIT_CODE = {"unreadable": 2, "refused": 1, "repaired": 0, "noted": 0}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (100, 80), "green").save(folder / name)
    return folder


@pytest.fixture
def annotations(tmp_path):
    def write(content):
        path = tmp_path / "instances.json"
        path.write_bytes(content if isinstance(content, bytes) else encode(content))
        return path

    return write


def document_with(record, **fields):
    document = sound_document()
    document[record][0].update(fields)
    return document


def findings(report):
    return {finding.code: finding for finding in report.findings}


def test_a_sound_file_has_no_findings(annotations, images):
    report = validate_coco(annotations(sound_document()), images, images="decode", with_masks=True, strict=True)
    assert report.findings == []
    assert report.ok and report.exit_code == 0
    assert (report.num_images, report.num_annotations, report.num_usable_boxes, report.num_categories) == (2, 4, 4, 2)


@pytest.mark.parametrize("fault", ALL_FAULTS, ids=str)
def test_a_corrupted_file_gets_its_verdict(fault, annotations):
    report = validate_coco(annotations(fault.content))
    found = findings(report)
    assert fault.code in found, str(report)
    assert found[fault.code].severity == SEVERITY[fault.verdict]
    assert found[fault.code].count == fault.count
    assert report.exit_code == EXIT_CODE[fault.verdict], str(report)
    if fault.verdict != "unreadable":
        assert report.num_usable_boxes == fault.num_boxes


@pytest.mark.parametrize("fault", ALL_FAULTS, ids=str)
def test_the_loader_gives_the_verdict_of_the_check(fault, annotations, images, tmp_path):
    path = annotations(fault.content)
    if fault.verdict in ("unreadable", "refused"):
        with pytest.raises(AnnotationError) as error:
            load_coco(images, path, cache_dir=tmp_path / "cache")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    else:
        dataset = load_coco(images, path, cache_dir=tmp_path / "cache")
        crowds = sum(map(sum, (objects["iscrowd"] for objects in dataset["objects"])))
        assert sum(len(objects["bbox"]) for objects in dataset["objects"]) - crowds == fault.num_boxes


@pytest.mark.parametrize("fault", [fault for fault in ALL_FAULTS if fault.verdict == "repaired"], ids=str)
def test_strict_refuses_what_would_be_repaired(fault, annotations, images, tmp_path):
    path = annotations(fault.content)
    assert findings(validate_coco(path, strict=True))[fault.code].severity == "error"
    with pytest.raises(AnnotationError):
        load_coco(images, path, cache_dir=tmp_path / "cache", strict=True)


def test_one_pass_finds_all_faults_at_once(annotations):
    document = sound_document()
    document["annotations"][0]["bbox"] = [1, 2, 3]
    document["annotations"][1]["category_id"] = 77
    document["annotations"][2]["id"] = 0
    document["images"][1]["file_name"] = "../2.png"
    assert set(findings(validate_coco(annotations(document)))) >= {
        "box-malformed",
        "unknown-category",
        "annotation-id-zero",
        "image-path",
    }


def test_an_error_names_file_and_annotation(annotations, images, tmp_path):
    path = annotations(document_with("annotations", id=4711, bbox=None))
    with pytest.raises(AnnotationError, match=r"instances\.json: bbox missing .*annotation 4711 \(image 1\): bbox None"):
        load_coco(images, path, cache_dir=tmp_path / "cache")


def test_examples_are_few_and_of_one_line(annotations):
    document = sound_document()
    document["categories"][0]["name"] = None
    for annotation in document["annotations"] * 5:
        document["annotations"].append({**annotation, "bbox": ["\x1b[2J\n" * 100]})
    finding = findings(validate_coco(annotations(document)))["box-malformed"]
    assert finding.count == 20 and len(finding.examples) == NUM_EXAMPLES
    assert all(len(example) <= 200 and example.isprintable() for example in finding.examples)


def test_corners_are_refused_by_name_and_read_with_the_option(annotations):
    fault = next(fault for fault in ALL_FAULTS if fault.name == "corners-for-sizes")
    path = annotations(fault.content)
    assert "--box-format xyxy" in findings(validate_coco(path))["box-format"].message
    report = validate_coco(path, box_format="xyxy")
    assert report.findings == [] and report.num_usable_boxes == 4


def test_unknown_options_are_refused(annotations):
    path = annotations(sound_document())
    with pytest.raises(ValueError, match="images must be one of header, decode, none, got 'all'"):
        validate_coco(path, images="all")
    with pytest.raises(ValueError, match="box_format must be one of xywh, xyxy, got 'cxcywh'"):
        validate_coco(path, box_format="cxcywh")
    with pytest.raises(ValueError, match="no such image folder"):
        validate_coco(path, path.parent / "nowhere")


def test_a_missing_file_is_unreadable(tmp_path):
    report = validate_coco(tmp_path / "nowhere.json")
    assert report.exit_code == 2 and "No such file" in str(report)


# segmentations


@pytest.mark.parametrize("garbage", GARBAGE_SEGMENTATIONS.values(), ids=GARBAGE_SEGMENTATIONS)
def test_garbage_segmentations_are_not_looked_at_without_masks(garbage, annotations, images, tmp_path):
    content = encode(sound_document()).replace(b"[[1, 1, 9, 1, 9, 9]]", garbage, 1)
    path = annotations(content)
    assert validate_coco(path, strict=True).findings == []
    dataset = load_coco(images, path, cache_dir=tmp_path / "cache", strict=True)
    assert dataset[0]["objects"]["bbox"] == [[10, 20, 30, 40], [50, 10, 20, 30]]


@pytest.mark.parametrize(
    ("segmentation", "code"),
    [
        (None, "segmentation-missing"),
        ([], "segmentation-missing"),
        ([[1, 2, 3, 4]], "segmentation-short"),
        ([[1, 2, 3, 4], [1, 1, 5, 1, 5, 5]], "segmentation-short"),
        ([1, 2, 3, 4, 5, 6], "segmentation-malformed"),
        ([[1, 2, 3, 4, 5, 6, 7]], "segmentation-malformed"),
        ([["1", 2, 3, 4, 5, 6]], "segmentation-malformed"),
        ([[float("nan"), 2, 3, 4, 5, 6]], "segmentation-malformed"),
        ({"counts": [8000]}, "segmentation-malformed"),
        ({"size": [100, 80], "counts": [8000]}, "segmentation-malformed"),
        ({"size": [80, 100], "counts": [7999]}, "segmentation-malformed"),
        ({"size": [80, 100], "counts": [-1, 8001]}, "segmentation-malformed"),
        ({"size": [80, 100]}, "segmentation-malformed"),
        ("polygon", "segmentation-malformed"),
    ],
)
def test_segmentation_faults_are_named_when_masks_are_asked_for(segmentation, code, annotations):
    report = validate_coco(annotations(document_with("annotations", segmentation=segmentation)), with_masks=True)
    assert set(findings(report)) == {code}


def test_run_lengths_of_the_right_size_are_sound(annotations):
    segmentation = {"size": [80, 100], "counts": [4000, 4000]}
    report = validate_coco(annotations(document_with("annotations", segmentation=segmentation)), with_masks=True)
    assert report.findings == []


# image files


@pytest.mark.parametrize("name", ESCAPING_NAMES, ids=lambda name: repr(name[:20]))
def test_names_that_escape_are_refused_without_a_folder_too(name, annotations):
    report = validate_coco(annotations(document_with("images", file_name=name)))
    assert ESCAPING_NAMES[name] in findings(report)["image-path"].examples[0]


def test_every_missing_file_is_counted(annotations, images):
    (images / "1.png").unlink()
    (images / "2.png").unlink()
    for mode in ("none", "header", "decode"):
        report = validate_coco(annotations(sound_document()), images, images=mode)
        assert report.count("image-missing") == 2 and report.exit_code == 1


def test_files_in_sub_folders_are_found(annotations, images):
    (images / "a" / "b").mkdir(parents=True)
    (images / "1.png").rename(images / "a" / "b" / "1.png")
    for name in ("a/b/1.png", "./a/b/1.png", "a//b/1.png"):
        assert validate_coco(annotations(document_with("images", file_name=name)), images).findings == []


def test_links_may_lead_about_in_the_folder_but_not_out_of_it(annotations, images, tmp_path):
    (images / "inside.png").symlink_to(images / "2.png")
    assert validate_coco(annotations(document_with("images", file_name="inside.png")), images).ok
    Image.new("RGB", (100, 80)).save(tmp_path / "secret.png")
    (images / "outside.png").symlink_to(tmp_path / "secret.png")
    (images / "folder").symlink_to(tmp_path)
    for name in ("outside.png", "folder/secret.png"):
        report = validate_coco(annotations(document_with("images", file_name=name)), images)
        assert "leaves the image folder" in findings(report)["image-path"].examples[0]


def test_folders_and_pipes_are_no_images(annotations, images):
    (images / "folder").mkdir()
    os.mkfifo(images / "pipe")
    for name in ("folder", "pipe"):
        report = validate_coco(annotations(document_with("images", file_name=name)), images)
        assert "not a regular file" in findings(report)["image-path"].examples[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", bytes(200)],
    ids=["empty", "html", "png-signature-only", "pdf", "zeros"],
)
def test_files_that_are_no_images_are_found_by_the_header(content, annotations, images):
    (images / "1.png").write_bytes(content)
    report = validate_coco(annotations(sound_document()), images)
    assert report.count("image-unreadable") == 1 and "1.png" in findings(report)["image-unreadable"].examples[0]


def test_half_an_image_is_found_by_decoding_it(annotations, images):
    noise = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "1.jpg")
    whole = (images / "1.jpg").read_bytes()
    (images / "1.jpg").write_bytes(whole[: len(whole) // 2])
    path = annotations(document_with("images", file_name="1.jpg"))
    assert validate_coco(path, images, images="header").ok
    assert validate_coco(path, images, images="decode").count("image-unreadable") == 1


def test_another_size_than_the_file_says_is_an_error(annotations, images):
    Image.new("RGB", (101, 80)).save(images / "1.png")
    finding = findings(validate_coco(annotations(sound_document()), images))["image-size-mismatch"]
    assert "the file is 101 x 80, the annotation file says 100 x 80" in finding.examples[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_turned_before_sizes_are_compared(orientation, annotations, images):
    turned = orientation >= 5
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (80, 100) if turned else (100, 80)).save(images / "1.jpg", exif=exif)
    upright = annotations(document_with("images", file_name="1.jpg"))
    assert set(findings(validate_coco(upright, images))) == (set() if orientation == 1 else {"image-exif-turned"})
    Image.new("RGB", (100, 80)).save(images / "1.jpg", exif=exif)
    expected = {"image-exif-swapped"} if turned else ({"image-exif-turned"} if orientation > 1 else set())
    assert set(findings(validate_coco(upright, images))) == expected


def test_a_decompression_bomb_is_refused_on_its_header(annotations, images):
    Image.new("1", (3000, 2000)).save(images / "1.png")
    path = annotations(document_with("images", width=3000, height=2000))
    assert validate_coco(path, images, images="decode").ok
    report = validate_coco(path, images, images="decode", max_pixels=5_999_999)
    assert "3000 x 2000 pixels" in findings(report)["image-bomb"].examples[0]


# the report


def test_the_report_reads_as_a_table_and_as_json(annotations):
    report = validate_coco(annotations(document_with("annotations", bbox=[90, 0, 30, 40])))
    assert "warning        1  box-partly-outside" in str(report) and "usable: 0 kinds of error" in str(report)
    document = json.loads(report.to_json())
    assert document["ok"] is True and document["exit_code"] == 0
    assert document["findings"][0]["code"] == "box-partly-outside" and document["findings"][0]["count"] == 1


def test_errors_come_before_warnings_before_notes():
    report = ValidationReport("a.json")
    for code in ("crowd", "box-empty", "box-malformed"):
        report.add(code, ["here"], 1)
    assert [finding.severity for finding in report.findings] == ["error", "warning", "note"]


def test_every_fault_in_the_list_has_a_severity_and_a_message():
    for severity, message in FAULTS.values():
        assert severity in ("error", "warning", "note") and message


def test_counting_an_unknown_fault_is_an_error():
    with pytest.raises(ValueError, match="unknown fault 'box-emtpy'"):
        ValidationReport("a.json").count("box-emtpy")
