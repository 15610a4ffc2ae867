"""The checkpoint that comes with the project."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from sim_hf import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data import render_scene
from sim_hf.evaluation.prediction import predict_images

ASSET = Path(__file__).resolve().parents[1] / "assets" / "sim-tiny"


def test_the_files_are_safetensors_json_and_a_card_and_small():
    files = {path.name: path.stat().st_size for path in ASSET.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert sum(files.values()) <= 16 * 2**20


def test_it_loads_whole_and_all_weights_are_finite():
    model, info = SIMForInstanceSegmentation.from_pretrained(ASSET, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_it_finds_an_easy_generated_object():
    model = SIMForInstanceSegmentation.from_pretrained(ASSET, dtype=torch.float32).eval()
    processor = SIMImageProcessor.from_pretrained(ASSET)
    best = []
    for seed in range(4):
        scene = render_scene(seed, num_objects=1, difficulty=0.0)
        if len(scene.masks) == 0:
            continue
        (result,) = predict_images(model, processor, [Image.fromarray(scene.image)], threshold=0.1)
        truth = torch.from_numpy(scene.masks[0])
        ious = [float((mask & truth).sum() / (mask | truth).sum()) for mask in result["masks"]]
        best.append(max(ious, default=0.0))
    assert sum(best) / len(best) > 0.4, best


def test_the_card_names_data_licence_and_command():
    card = (ASSET / "README.md").read_text()
    for word in ("license:", "boxes only", "sim-hf train", "AP50", "licence"):
        assert word in card, word


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_no_code_is_needed_to_load_it(name):
    assert "auto_map" not in (ASSET / name).read_text()
