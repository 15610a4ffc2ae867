"""The commands, as a user gives them."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from factories import save_tiny_model
from sim_hf.cli import main
from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor


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


def train(shapes, tmp_path, *more):
    model = tmp_path / "start"
    if not model.exists():
        save_tiny_model(model)
    fast = ["--batch_size", 2, "--max_steps", 2, "--eval_every", 0, "--image_size", 64, "--report_to", "none"]
    options = ["--model", model, "--data", shapes, "--output_dir", tmp_path / "run", "--push_to_hub", "true", *fast, *more]
    try:
        return main(["train", *map(str, options)])
    finally:
        AcceleratorState._reset_state(True)


def test_train_pushes_at_its_end_with_a_card_of_the_run(hub, shapes, tmp_path, monkeypatch, capsys):
    assert train(shapes, tmp_path) == 2
    assert "--push_to_hub needs --hub_model_id" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert train(shapes, tmp_path, "--hub_model_id", "ann/run") == 2
    assert "may not write to ann/run" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    private = ["--hub_model_id", "ann/run", "--hub_private_repo", "true", "--hub_license", "mit"]
    assert train(shapes, tmp_path, *private, "--stop_after", 1) == 0
    assert "not pushed: the run was stopped at step 1 of 2" in capsys.readouterr().out
    assert set(hub.files("ann/run")) == {".gitattributes"}
    assert train(shapes, tmp_path, *private, "--resume", "auto") == 0
    card = hub.files("ann/run")["README.md"].decode()
    assert "license: mit" in card and "| steps | 2 of 2 |" in card and "## Results" in card and str(tmp_path) not in card
    assert hub.repos["models", "ann/run"].private


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


def test_push_with_code_takes_the_files_of_the_model_along_and_no_others(hub, run):
    assert main(["push", str(run), "ann/shapes", "--with-code"]) == 0
    files = hub.files("ann/shapes")
    assert {"configuration_sim.py", "modeling_sim.py", "image_processing_sim.py", "pipeline.py"} <= set(files)
    assert "evil.py" not in files and files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert "trust_remote_code=True" in files["README.md"].decode()
    assert main(["push", str(run), "ann/shapes"]) == 0
    assert not any(name.endswith(".py") for name in hub.files("ann/shapes"))


@pytest.mark.e2e
def test_the_code_on_the_hub_works_where_only_transformers_is(hub, run, shapes, environment, tmp_path):
    main(["push", str(run), "ann/shapes", "--with-code", "--private"])
    local = SIMForInstanceSegmentation.from_pretrained(run / "model")
    picture = next((shapes / "images").iterdir())
    inputs = SIMImageProcessor.from_pretrained(run / "model")(Image.open(picture).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        expected = local(inputs["pixel_values"], inputs["pixel_mask"])
    program = f"""
import sys
sys.modules["sim_hf"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

model = AutoModelForInstanceSegmentation.from_pretrained("ann/shapes", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("ann/shapes", trust_remote_code=True)
inputs = processor(Image.open({str(picture)!r}).convert("RGB"), return_tensors="pt")
with torch.no_grad():
    outputs = model(inputs["pixel_values"], inputs["pixel_mask"])
torch.save([outputs.class_queries_logits, outputs.masks_queries_logits], {str(tmp_path / "out.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found[0], expected.class_queries_logits) and torch.equal(found[1], expected.masks_queries_logits)


@pytest.mark.e2e
def test_a_new_process_pushes_and_another_predicts_from_the_hub(hub, run, shapes, environment, tmp_path):
    """Environment variables only, as on a user's machine."""
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
