"""scripts/average_models.py: the mean of models that began with the same weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from factories import save_tiny_model
from sim_hf.models.architectures import load_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "average_models.py"


@pytest.fixture(scope="module")
def average():
    specification = importlib.util.spec_from_file_location("average_models", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.average


def test_the_mean_of_three_models_is_the_mean_of_every_weight(average, tmp_path):
    folders = [save_tiny_model(tmp_path / name) for name in "abc"]
    for folder in folders[1:]:
        model = load_model(str(folder))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model.save_pretrained(folder)
    states = [load_model(str(folder)).state_dict() for folder in folders]
    mean = average(folders).state_dict()
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            expected = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, states[0][name]), name


def test_other_classes_and_other_weights_are_refused(average, tmp_path):
    first = save_tiny_model(tmp_path / "first")
    model = load_model(str(first))
    model.config.id2label = {label: f"other {label}" for label in model.config.id2label}
    model.save_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="other classes"):
        average([first, tmp_path / "second"])
    with pytest.raises(ValueError, match="other weights"):
        average([first, save_tiny_model(tmp_path / "third", "swin")])
