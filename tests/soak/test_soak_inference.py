"""Two thousand predictions in one process, with pictures of all sizes. `make soak`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from growth import Growth
from PIL import Image
from transformers import pipeline

from sim_hf.data import render_scene

MODEL = Path(__file__).parents[2] / "assets" / "sim-tiny"
FLAT = 10  # MB per 1000 predictions


@pytest.mark.soak
@pytest.mark.timeout(10_800)
def test_two_thousand_predictions(capsys):
    segmenter = pipeline("instance-segmentation", model=str(MODEL), device="cpu")
    generator, growth, num_found = np.random.default_rng(0), Growth(), 0
    pictures = [_picture(render_scene(seed, size=160)) for seed in range(8)]
    for number in range(1, 2001):
        size = tuple(int(side) for side in generator.integers(80, 240, 2))
        with torch.no_grad():
            num_found += len(segmenter(pictures[number % len(pictures)].resize(size)))
        if number % 50 == 0:
            growth.sample(number)
    with capsys.disabled():
        print(growth, f"{num_found} instances")
    assert num_found > 0
    assert growth.megabytes_per_thousand < FLAT and growth.more_files <= 0


def _picture(scene) -> Image.Image:
    return scene.image if isinstance(scene.image, Image.Image) else Image.fromarray(np.asarray(scene.image))
