"""A folder in which the documents' examples run: the names they use, filled with generated scenes."""

import json
import shutil

import datasets
import pytest
from documents import ROOT
from PIL import Image

from sim_hf.data import render_scene, write_scenes

LINKED = ("assets", "scripts", "spaces", "examples")


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """folder/ with boxes and masks, boxes.json and images/ without masks, photo.jpg."""
    root = tmp_path_factory.mktemp("documents")
    folder = write_scenes(root / "folder", num_train=4, num_val=5, size=128, progress=False)
    (root / "images").symlink_to(folder / "images")
    document = json.loads((folder / "instances_val.json").read_text())
    document["annotations"] = [{k: v for k, v in a.items() if k != "segmentation"} for a in document["annotations"]]
    (root / "boxes.json").write_text(json.dumps(document))
    Image.fromarray(render_scene(4, size=256).image).save(root / "photo.jpg")
    return root


@pytest.fixture
def workplace(generated, tmp_path, monkeypatch):
    """A copy of it as the current directory, with the project's own folders beside it."""
    place = tmp_path / "place"
    shutil.copytree(generated, place, symlinks=True)
    for name in LINKED:
        (place / name).symlink_to(ROOT / name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(place)
    return place
