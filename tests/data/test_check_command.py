"""`sim-hf check`: exit codes and output."""

import json

import pytest
from PIL import Image

from coco_faults import encode, sound_document
from sim_hf.cli.check import main


@pytest.fixture
def check(tmp_path, capsys):
    def run(document, *options):
        path = tmp_path / "a.json"
        path.write_bytes(document if isinstance(document, bytes) else encode(document))
        code = main([str(path), *options])
        return code, capsys.readouterr()

    return run


def with_first_box(box):
    document = sound_document()
    document["annotations"][0]["bbox"] = box
    return document


def test_a_sound_file_exits_with_0(check):
    code, output = check(sound_document(), "--strict", "--masks")
    assert code == 0 and "2 images, 4 annotations (4 usable), 2 categories" in output.out


def test_warnings_exit_with_0_and_with_1_under_strict(check):
    assert check(with_first_box([90, 0, 30, 40]))[0] == 0
    assert check(with_first_box([90, 0, 30, 40]), "--strict")[0] == 1


def test_errors_exit_with_1_and_unreadable_files_with_2(check):
    assert check(with_first_box(None))[0] == 1
    assert check(b"{")[0] == 2
    assert main(["/nowhere/a.json"]) == 2


def test_images_are_looked_at_when_their_folder_is_given(check, tmp_path):
    code, output = check(sound_document(), "--images", str(tmp_path))
    assert code == 1 and "image-missing" in output.out
    for name in ("1.png", "2.png"):
        Image.new("RGB", (100, 80)).save(tmp_path / name)
    assert check(sound_document(), "--images", str(tmp_path), "--decode")[0] == 0


def test_a_folder_that_is_not_there_is_a_usage_error(check, tmp_path):
    code, output = check(sound_document(), "--images", str(tmp_path / "nowhere"))
    assert code == 2 and "no such image folder" in output.err
    assert check(sound_document(), "--decode")[0] == 2


def test_json_output_is_json_and_nothing_else(check):
    code, output = check(with_first_box([1, 2, 3]), "--json")
    assert code == 1 and json.loads(output.out)["findings"][0]["code"] == "box-malformed"


def test_corners_are_read_with_the_option(check):
    document = sound_document()
    boxes = ([60, 30, 90, 70], [40, 20, 95, 79], [55, 10, 99, 40], [10, 45, 60, 75])
    for annotation, box in zip(document["annotations"], boxes, strict=True):
        annotation["bbox"] = box
    assert check(document)[0] == 1
    assert check(document, "--box-format", "xyxy")[0] == 0
