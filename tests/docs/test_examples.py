"""The programs in examples/, as they stand, in a short form."""

import json
import math
import runpy

import pytest
import torch
from documents import ROOT
from PIL import Image

from factories import NAMES, SIZE, tiny_condinst, tiny_model, tiny_processor, write_shapes
from sim_hf.data import DetectionCollator, EvalTransform, SeededDataset, load_coco
from sim_hf.training.arguments import RunArguments, SupervisionArguments
from sim_hf.training.assembly import build_step

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


def weighed(model, place):
    """What examples/positive_weights.py makes of the objects of an image, beside what the image says of them."""
    program = runpy.run_path(str(ROOT / "examples" / "positive_weights.py"))
    step = build_step(model, tiny_processor(), SupervisionArguments(), RunArguments()).eval()
    rows = load_coco(place / "images", place / "instances_val.json", cache_dir=place / "cache")
    collate = DetectionCollator(tiny_processor().image_mean, tiny_processor().image_std)
    batch = collate([SeededDataset(rows, EvalTransform(SIZE))[0]])
    return program, batch["labels"][0]["boxes"], program["weigh"](step, batch, list(NAMES))


@pytest.mark.parametrize("make_model", [tiny_model, tiny_condinst])
def test_positive_weights_are_those_of_equation_6(make_model, tmp_path):
    program, boxes, objects = weighed(make_model(), write_shapes(tmp_path / "data"))
    assert len(objects) == len(boxes) > 0
    for found, box in zip(objects, boxes, strict=True):
        assert torch.equal(found.box_4, box) and len(found.weights_N) > 1
        expected = [math.exp(5 * float(iou)) for iou in found.ious_N]
        expected = [weight / sum(expected) for weight in expected]
        assert found.weights_N.tolist() == pytest.approx(expected, rel=1e-4) == sorted(expected, reverse=True)
        assert found.masks_NHW.shape == (len(found.weights_N), SIZE, SIZE)
        row = program["draw"](found, 4)
        assert len(row) == 6 and row[0].size == row[-1].size


def test_positive_weights_of_the_boxes_of_a_file(run):
    options = ["assets/sim-tiny", "--annotations", "boxes.json", "--images", "images", "--show", 0, "--objects", 2]
    place = run("positive_weights.py", *options, "--picture", "weights.jpg")
    assert Image.open(place / "weights.jpg").width > 1000  # a given box, four positives and their sum


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
