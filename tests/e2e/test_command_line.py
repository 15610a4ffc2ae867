"""The command line from end to end, each step in a process of its own, as a user runs it. `make e2e`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from factories import save_tiny_model, write_shapes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def call(*command, check=True):
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def sim_hf(*arguments, check=True):
    return call(sys.executable, "-m", "sim_hf", *arguments, check=check)


def two_processes(*arguments):
    launch = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv-backend",
        "c10d",
    )
    return call(*launch, "--rdzv-endpoint", "localhost:0", "-m", "sim_hf", *arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return save_tiny_model(folder / "model"), write_shapes(folder / "shapes", num_train=12, num_val=5)


def train_options(world, output, *more):
    model, shapes = world
    fast = ["--batch_size", 4, "--max_steps", 6, "--log_every", 2, "--eval_every", 0, "--image_size", 64, "--pseudo_start", 2]
    return ["train", "--model", model, "--data", shapes, "--output_dir", output, *fast, *more]


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def test_check_train_stop_resume_evaluate_predict_label(world, tmp_path):
    _, shapes = world
    val, images = shapes / "instances_val.json", shapes / "images"
    sim_hf("check", val, "--images", images, "--decode")
    sim_hf(*train_options(world, tmp_path / "whole"))
    sim_hf(*train_options(world, tmp_path / "parts", "--stop_after", 4))
    sim_hf(*train_options(world, tmp_path / "parts", "--resume", "auto"))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert 0 <= results["segm/AP"] <= 1
    assert list((tmp_path / "whole" / "pictures").glob("*.jpg"))
    model = tmp_path / "whole" / "model"
    sim_hf("evaluate", model, "--annotations", val, "--images", images, "--output", tmp_path / "evaluation", "--per-class")
    again = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert again["segm/AP"] == pytest.approx(results["segm/AP"], abs=1e-9)
    sim_hf("predict", model, images, "--output", tmp_path / "predictions")
    sim_hf("label", model, "--annotations", val, "--images", images, "--output", tmp_path / "labels.json")
    sim_hf("check", tmp_path / "labels.json", "--images", images)


def test_two_processes_evaluate_predict_and_label_as_one_does(world, tmp_path):
    model, shapes = world
    source = ["--annotations", shapes / "instances_val.json", "--images", shapes / "images"]
    for name, run in (("one", sim_hf), ("two", two_processes)):
        run("evaluate", model, *source, "--output", tmp_path / name / "evaluation")
        run(
            "predict",
            model,
            shapes / "images",
            "--output",
            tmp_path / name / "predictions",
            "--threshold",
            "0",
            "--batch-size",
            1,
        )
        run("label", model, *source, "--output", tmp_path / name / "labels.json")
    for file in ("evaluation/detections.json", "predictions/predictions.json", "labels.json"):
        one, two = (json.loads((tmp_path / name / file).read_text()) for name in ("one", "two"))
        assert _rounded(one) == _rounded(two), file


def _rounded(value):
    """Scores depend on the other images of a forward pass in the last bits."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if key != "segmentation"}
    return value


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_in_the_hub_convention_trains_with_the_same_command(world, tmp_path, streaming):
    from sim_hf.data import load_coco

    model, shapes = world
    for split, file in (("train", "instances_train.json"), ("validation", "instances_val.json")):
        rows = load_coco(shapes / "images", shapes / file, cache_dir=tmp_path / "cache")
        folder = tmp_path / "hub"
        folder.mkdir(exist_ok=True)
        embedded = rows.map(lambda row: row)  # its own copy, as a downloaded set is
        embedded.to_parquet(folder / f"{split}.parquet")
    fast = ["--batch_size", 2, "--max_steps", 3, "--eval_every", 0, "--image_size", 64]
    more = ["--streaming", "true"] if streaming else []
    sim_hf("train", "--model", model, "--dataset", folder, "--output_dir", tmp_path / "run", *fast, *more)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_demo_runs_and_says_what_comes_next(world, tmp_path):
    model, shapes = world
    done = sim_hf("demo", "--data", shapes, "--model", model, "--steps", 4, "--output-dir", tmp_path / "demo", "--compare")
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert {"segm/AP", "before", "filled_boxes", "mean_fill", "pseudo_masks", "full_supervision"} <= set(results)
    assert (tmp_path / "demo" / "overlays.jpg").exists() and (tmp_path / "demo" / "model" / "config.json").exists()
    assert "sim-hf label" in done.stdout and "mean fill" in done.stdout


def test_the_demo_takes_boxes_as_another_tool_laid_them_out(world, tmp_path):
    model, shapes = world
    document = json.loads((shapes / "instances_train.json").read_text())
    for annotation in document["annotations"]:
        annotation["segmentation"] = []
    export = tmp_path / "export" / "train"
    export.mkdir(parents=True)
    (export / "_annotations.coco.json").write_text(json.dumps(document))
    for image in document["images"]:
        (export / image["file_name"]).write_bytes((shapes / "images" / image["file_name"]).read_bytes())
    done = sim_hf("demo", "--data", export.parent, "--model", model, "--steps", 2, "--output-dir", tmp_path / "demo")
    assert "images for val, made of the COCO files in" in done.stdout and "box AP   before" in done.stdout
    assert f"--annotations {tmp_path / 'demo' / 'data' / 'instances_val.json'}" in done.stdout


def test_the_demo_deletes_nothing_that_it_did_not_write(world, tmp_path):
    model, shapes = world
    (tmp_path / "thesis.tex").write_text("years of work")
    done = sim_hf("demo", "--data", shapes, "--model", model, "--steps", 2, "--output-dir", tmp_path, check=False)
    assert done.returncode == 2 and "choose another folder" in done.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_trackers_write_their_logs_offline(world, tmp_path):
    output = tmp_path / "run"
    sim_hf(*train_options(world, output, "--report_to", "tensorboard", "trackio"))
    assert list((output / "logs").rglob("events.out.tfevents.*"))
