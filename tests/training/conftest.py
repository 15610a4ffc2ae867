"""Seven drawn pictures to train on and three to measure on."""

import pytest

from factories import write_shapes
from sim_hf.data import load_coco


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder. Nothing is written into it."""
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=7)


@pytest.fixture(scope="session")
def rows(shapes, tmp_path_factory):
    """{"train": rows, "val": rows}"""
    cache = tmp_path_factory.mktemp("cache")
    return {
        split: load_coco(shapes / "images", shapes / f"instances_{split}.json", cache_dir=cache) for split in ("train", "val")
    }
