"""A CondInst goes to the Hub with its card, and comes back: as a class of the package, and as code for those without it."""

import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForInstanceSegmentation, pipeline

from factories import save_tiny_condinst
from sim_hf import load_model
from sim_hf.cli import main
from sim_hf.models.condinst import CondInstForInstanceSegmentation
from sim_hf.models.sim import SIMImageProcessor


@pytest.fixture
def model(tmp_path):
    """A folder; an untrained network is sure of nothing, so it shows what it finds however unsure."""
    return save_tiny_condinst(tmp_path / "model", score_threshold=0.0, max_detections=5)


def test_it_comes_back_bit_for_bit_under_a_card_that_names_it(hub, model, shapes):
    assert main(["push", str(model), "ann/dense", "--license", "mit"]) == 0
    local = load_model(model)
    for back in (load_model("ann/dense"), AutoModelForInstanceSegmentation.from_pretrained("ann/dense")):
        assert type(back) is CondInstForInstanceSegmentation
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in local.state_dict().items())
    card = hub.files("ann/dense")["README.md"].decode()
    assert re.search(r"^CondInst, 0\.\d M parameters, 2 classes", card, re.M) and 'load_model("ann/dense")' in card
    assert "- condinst" in card and "mask2former" not in card.lower()
    picture = Image.open(next((shapes / "images").iterdir())).convert("RGB")
    found = pipeline("instance-segmentation", model="ann/dense")(picture, threshold=0.0)
    assert 0 < len(found) <= 5 and found[0]["mask"].shape == (picture.height, picture.width)


def test_its_code_goes_along_when_it_is_asked_for(hub, model):
    assert main(["push", str(model), "ann/dense", "--with-code"]) == 0
    files = hub.files("ann/dense")
    assert {"configuration_condinst.py", "modeling_condinst.py", "image_processing_sim.py", "pipeline.py"} <= set(files)
    assert not any(b"from .." in content for name, content in files.items() if name.endswith(".py"))
    assert "modeling_sim.py" not in files and "trust_remote_code=True" in files["README.md"].decode()
    assert main(["push", str(model), "ann/dense"]) == 0
    assert not any(name.endswith(".py") for name in hub.files("ann/dense"))


@pytest.mark.e2e
def test_its_code_works_where_only_transformers_is(hub, model, shapes, environment, tmp_path):
    main(["push", str(model), "ann/dense", "--with-code", "--private"])
    picture = next((shapes / "images").iterdir())
    inputs = SIMImageProcessor.from_pretrained(model)(Image.open(picture).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        expected = load_model(model)(inputs["pixel_values"], inputs["pixel_mask"])
    program = f"""
import sys
sys.modules["sim_hf"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation, pipeline

model = AutoModelForInstanceSegmentation.from_pretrained("ann/dense", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("ann/dense", trust_remote_code=True)
picture = Image.open({str(picture)!r}).convert("RGB")
inputs = processor(picture, return_tensors="pt")
with torch.no_grad():
    outputs = model(inputs["pixel_values"], inputs["pixel_mask"])
found = pipeline("instance-segmentation", model="ann/dense", trust_remote_code=True)(picture, threshold=0.0)
torch.save([outputs.class_queries_logits, outputs.masks_queries_logits, len(found)], {str(tmp_path / "out.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    classes, masks, count = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(classes, expected.class_queries_logits) and torch.equal(masks, expected.masks_queries_logits)
    assert 0 < count <= 5
