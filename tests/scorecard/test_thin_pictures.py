"""36 pipeline-parity: the thinnest pictures there are."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from factories import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def segmenter():
    with torch.random.fork_rng():
        model = tiny_model()
    return pipeline("instance-segmentation", model=model, image_processor=tiny_processor(), device="cpu", threshold=0.0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)], ids=str)
def test_36_thin_pictures_have_masks_of_their_size(size, segmenter):
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    alone = segmenter(Image.fromarray(noise))
    assert all(entry["mask"].shape == (size[1], size[0]) and np.isfinite(entry["score"]) for entry in alone)
    batched = segmenter([Image.fromarray(noise)] * 2, batch_size=2)
    for entries in batched:
        assert [entry["score"] for entry in entries] == pytest.approx([entry["score"] for entry in alone], abs=1e-4)
