"""The commands as a user runs them, in this process, on an untrained network of a few thousand weights."""

import json

import pytest
from pycocotools.coco import COCO

from factories import save_tiny_model, write_shapes
from sim_hf.cli import COMMANDS, main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return save_tiny_model(folder / "model"), write_shapes(folder / "shapes")


def run_label(world, output, *extra):
    model, shapes = world
    source = ["--annotations", str(shapes / "instances_val.json"), "--images", str(shapes / "images")]
    return main(["label", str(model), *source, "--output", str(output), *extra])


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"sim-hf {command}" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    assert main(["tran"]) == 2
    assert "unknown command 'tran'" in capsys.readouterr().err


def test_label_gives_every_box_a_mask_and_keeps_the_rest(world, tmp_path, capsys):
    output = tmp_path / "masks.json"
    assert run_label(world, output) == 0
    before = json.loads((world[1] / "instances_val.json").read_text())
    after = json.loads(output.read_text())
    assert before["images"] == after["images"] and before["categories"] == after["categories"]
    for old, new in zip(before["annotations"], after["annotations"], strict=True):
        assert {k: old[k] for k in ("id", "image_id", "category_id", "bbox", "iscrowd")} == {
            k: new[k] for k in ("id", "image_id", "category_id", "bbox", "iscrowd")
        }
        assert 0 <= new["score"] <= 1 and new["area"] > 0
    coco = COCO(str(output))
    assert all(coco.annToMask(a).sum() == a["area"] for a in coco.anns.values())
    assert "boxes filled in" in capsys.readouterr().out  # the file had real masks to compare with
    assert not list(tmp_path.glob("*.partial-*"))


def test_label_writes_polygons_on_request(world, tmp_path):
    output = tmp_path / "masks.json"
    assert run_label(world, output, "--polygons", "--crop-below", "1") == 0
    assert all(isinstance(a["segmentation"], list) for a in json.loads(output.read_text())["annotations"])


def test_label_goes_on_after_an_interruption_with_the_same_result(world, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    run_label(world, whole)
    import sim_hf.labeling as labeling

    real, calls = labeling.masks_for_boxes, []

    def dies_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(labeling, "masks_for_boxes", dies_at_the_third)
    assert run_label(world, resumed) == 130
    assert not resumed.exists() and list(tmp_path.glob("resumed.json.partial-*"))
    monkeypatch.setattr(labeling, "masks_for_boxes", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    calls.clear()
    assert run_label(world, resumed) == 0
    assert len(calls) == 1  # two of three images were done
    assert json.loads(whole.read_text()) == json.loads(resumed.read_text())


def test_label_refuses_to_overwrite_its_input(world, capsys):
    assert run_label(world, world[1] / "instances_val.json") == 2
    assert "input file" in capsys.readouterr().err


def test_label_keeps_masks_that_are_there(world, tmp_path):
    output = tmp_path / "masks.json"
    assert run_label(world, output, "--keep-masks") == 0
    before = json.loads((world[1] / "instances_val.json").read_text())
    assert json.loads(output.read_text())["annotations"] == before["annotations"]


def test_evaluate_prints_and_writes_the_coco_numbers(world, tmp_path, capsys):
    model, shapes = world
    source = ["--annotations", str(shapes / "instances_val.json"), "--images", str(shapes / "images")]
    assert main(["evaluate", str(model), *source, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"segm/AP", "segm/AP50", "segm/AP75", "bbox/AP", "command", "versions", "seed", "git"} <= set(results)
    assert 0 <= results["segm/AP"] <= 1
    assert "AP50" in capsys.readouterr().out
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert {d["category_id"] for d in detections} <= {3, 8}


def test_evaluate_without_masks_says_that_box_ap_is_not_mask_ap(world, tmp_path, capsys):
    model, shapes = world
    content = json.loads((shapes / "instances_val.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps(content))
    assert (
        main(["evaluate", str(model), "--annotations", str(boxes), "--images", str(shapes / "images"), "--output", str(tmp_path)])
        == 0
    )
    assert "not mask AP" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["segm/AP"] is None and results["bbox/AP"] is not None


def test_predict_writes_overlays_and_coco_results(world, tmp_path, capsys):
    model, shapes = world
    assert main(["predict", str(model), str(shapes / "images"), "--output", str(tmp_path), "--threshold", "0"]) == 0
    assert len(list(tmp_path.glob("*.jpg"))) == 11
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    table = json.loads((tmp_path / "images.json").read_text())
    assert {p["image_id"] for p in predictions} <= {image["id"] for image in table["images"]}
    assert {p["category_id"] for p in predictions} <= {category["id"] for category in table["categories"]}


def test_predict_goes_on_past_a_broken_picture_and_says_so(world, tmp_path, capsys):
    model, shapes = world
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    good = sorted((shapes / "images").iterdir())[0]
    assert main(["predict", str(model), str(good), str(broken), "--output", str(tmp_path / "out")]) == 1
    assert "broken.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere/at-all/model", "x.jpg", "--output", "o"], "x.jpg"),
        (["evaluate", "m", "--annotations", "missing.json", "--images", "."], "missing.json"),
        (["train", "--output_dir", "o"], "--data"),
        (["train", "--data", "missing-folder"], "missing-folder"),
        (["demo", "--backbone-weights", "w"], "--from-scratch"),
    ],
)
def test_wrong_input_ends_in_one_line_that_names_it(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[0] and len(error) == 2
