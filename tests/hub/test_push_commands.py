"""The commands, as a user gives them."""

import json
import os
import subprocess
import sys

import pytest

from factories import save_tiny_model
from sim_hf.cli import main


def test_push_says_where_it_went(hub, run, capsys):
    assert main(["push", str(run), "ann/shapes", "--license", "mit", "--private", "--message", "first"]) == 0
    assert f"pushed: {hub.url}/ann/shapes/commit/{hub.head('ann/shapes')}" in capsys.readouterr().out
    repo = hub.repos["models", "ann/shapes"]
    assert repo.private and repo.titles[hub.head("ann/shapes")] == "first"
    assert b"license: mit" in hub.files("ann/shapes")["README.md"]


def test_push_takes_a_model_folder_and_a_branch(hub, tmp_path):
    assert main(["push", str(save_tiny_model(tmp_path)), "ann/shapes", "--revision", "small"]) == 0
    assert "model.safetensors" in hub.files("ann/shapes", revision="small")
    assert set(hub.files("ann/shapes")) == {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "arguments", "message"),
    [
        ("", ["RUN", "ann/shapes"], "no access token"),
        ("hf_wrong", ["RUN", "ann/shapes"], "does not know this access token"),
        ("hf_writer", ["RUN", "bob/shapes"], "may not write to bob/shapes"),
        ("hf_writer", ["RUN", "shapes"], "owner/name"),
        ("hf_writer", ["nowhere", "ann/shapes"], "neither a model nor a run"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(hub, run, monkeypatch, capsys, token, arguments, message):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", *(str(run) if part == "RUN" else part for part in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("sim-hf push: error:" in line and message in line for line in lines), lines
    assert not hub.repos


def test_push_dataset_takes_boxes_or_masks(hub, shapes, capsys):
    files = ["--images", str(shapes / "images"), "--train", str(shapes / "instances_train.json")]
    assert main(["push-dataset", "ann/boxes", *files, "--license", "cc0-1.0"]) == 0
    assert "pushed:" in capsys.readouterr().out
    assert main(["push-dataset", "ann/masks", *files, "--validation", str(shapes / "instances_val.json"), "--masks"]) == 0
    boxes, masks = (hub.files(name, "datasets") for name in ("ann/boxes", "ann/masks"))
    assert b"segmentation" not in boxes["data/train-00000-of-00001.parquet"]
    assert b"segmentation" in masks["data/validation-00000-of-00001.parquet"]
    assert "| train | 8 | 12 |" in boxes["README.md"].decode() and "| train | 8 | 12 | 12 |" in masks["README.md"].decode()
    with pytest.raises(SystemExit):
        main(["push-dataset", "ann/boxes", "--images", str(shapes / "images")])


def test_push_space(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nsdk: gradio\n---\n")
    (tmp_path / "app.py").write_text("")
    assert main(["push-space", str(tmp_path), "ann/space"]) == 0
    assert "app.py" in hub.files("ann/space", "spaces")


@pytest.mark.e2e
def test_a_new_process_pushes_and_another_predicts_from_the_hub(hub, run, shapes, tmp_path):
    """Environment variables only, as on a user's machine."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writer"}
    command = [sys.executable, "-m", "sim_hf"]
    picture = next((shapes / "images").iterdir())
    for arguments in (
        ["push", run, "ann/shapes", "--private"],
        ["predict", "ann/shapes", picture, "--output", tmp_path / "out"],
    ):
        done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "predictions.json").is_file()
    assert json.loads(hub.files("ann/shapes")["config.json"])["model_type"] == "sim"
