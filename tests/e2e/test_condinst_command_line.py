"""The commands with `--preset condinst-tiny`, and a model folder that loads without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ResNetConfig

from sim_hf.data import write_scenes
from sim_hf.models.architectures import architecture_of, load_model, preset_processor
from sim_hf.models.condinst import CondInstConfig, CondInstForInstanceSegmentation

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def call(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sim_hf(*arguments):
    return call(sys.executable, "-m", "sim_hf", *arguments)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=6, num_val=2, size=128, progress=False)


def test_train_stop_resume_evaluate_predict_label(scenes, tmp_path):
    source = ["--annotations", scenes / "instances_val.json", "--images", scenes / "images"]
    fast = ["--batch_size", 2, "--max_steps", 4, "--eval_every", 0, "--image_size", 128, "--report_to", "none"]
    train = ["train", "--preset", "condinst-tiny", "--data", scenes, "--pseudo_start", 1, "--paste_probability", 0.5, *fast]
    sim_hf(*train, "--output_dir", tmp_path / "whole")
    sim_hf(*train, "--output_dir", tmp_path / "parts", "--stop_after", 2)
    sim_hf(*train, "--output_dir", tmp_path / "parts", "--resume", "auto")
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    model = tmp_path / "whole" / "model"
    sim_hf("evaluate", model, *source, "--output", tmp_path / "evaluation")
    assert 0 <= json.loads((tmp_path / "evaluation" / "results.json").read_text())["segm/AP"] <= 1
    sim_hf("predict", model, scenes / "images", "--output", tmp_path / "predictions", "--threshold", 0)
    sim_hf("label", model, *source, "--output", tmp_path / "labels.json")
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert all(annotation["segmentation"] for annotation in labels["annotations"])


CLEAN = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation
model = AutoModelForInstanceSegmentation.from_pretrained({folder!r}, trust_remote_code=True).eval()
AutoImageProcessor.from_pretrained({folder!r}, trust_remote_code=True)
assert "sim_hf" not in sys.modules
images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
print(repr(float(model(images).class_logits.sum())))
"""


def test_a_folder_with_code_loads_without_the_package(tmp_path):
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = CondInstConfig(backbone_config=backbone, feature_size=16, num_tower_layers=1, mask_feature_size=16, num_labels=2)
    model = CondInstForInstanceSegmentation(config).eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    architecture_of(folder).save_with_code(folder, load_model(folder), preset_processor("condinst-tiny"))
    assert not any("from .." in path.read_text() for path in folder.glob("*.py"))
    out = call(sys.executable, "-c", CLEAN.format(folder=str(folder)), HF_MODULES_CACHE=str(tmp_path / "modules"))
    with torch.no_grad():
        expected = model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))).class_logits.sum()
    assert float(out.strip().splitlines()[-1]) == pytest.approx(float(expected), rel=1e-5)
