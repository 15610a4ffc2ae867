"""The programs in examples/, as they stand, in a short form."""

import json
import runpy

import pytest
from documents import ROOT
from PIL import Image

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(workplace, monkeypatch):
    """run("name.py", options...) in the folder of the documents' examples."""

    def run(name, *options):
        monkeypatch.setattr("sys.argv", [name, *map(str, options)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return workplace

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_says_what_it_does_and_how_to_call_it(name, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    assert stop.value.code == 0
    assert f"python examples/{name}" in capsys.readouterr().out


def test_label_your_coco_boxes_on_generated_scenes(run):
    place = run("label_your_coco_boxes.py", "--scenes", 2)
    labelled = json.loads((place / "runs" / "label" / "masks.json").read_text())
    assert labelled["annotations"] and all(0 <= annotation["score"] <= 1 for annotation in labelled["annotations"])
    assert Image.open(place / "runs" / "label" / "masks.jpg").width > 1200  # boxes and masks of two scenes in a row


def test_label_your_coco_boxes_on_a_file_without_masks(run):
    place = run("label_your_coco_boxes.py", "--annotations", "boxes.json", "--images", "images", "--show", 2)
    assert all(a["segmentation"] for a in json.loads((place / "runs" / "label" / "masks.json").read_text())["annotations"])
    assert all("segmentation" not in a for a in json.loads((place / "boxes.json").read_text())["annotations"])


@pytest.mark.e2e
def test_finetune_on_your_data(run, capsys):
    options = ["--data", "folder", "--steps", 3, "--batch_size", 2]
    place = run("finetune_on_your_data.py", *options)
    assert (place / "runs" / "finetune" / "model" / "preprocessor_config.json").exists()
    assert "segm/AP50" in capsys.readouterr().out
    run("finetune_on_your_data.py", *options, "--resume")  # nothing is left to do, and that is no error


@pytest.mark.e2e
def test_compare_supervisions(run):
    place = run("compare_supervisions.py", "--data", "folder", "--steps", 2, "--batch_size", 2)
    table = (place / "runs" / "compare" / "table.md").read_text().splitlines()
    assert [line.split("`")[1] for line in table[2:]] == ["boxinst", "sim", "full"]
