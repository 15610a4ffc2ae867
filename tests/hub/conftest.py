"""A Hub on loopback for the tests of this folder, and a client that knows no other."""

import os

import datasets
import huggingface_hub
import pytest
import transformers.utils.hub
from accelerate.state import AcceleratorState
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _http

from factories import make_arguments, save_tiny_model, write_shapes
from sim_hf.training.trainer import Trainer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; the client libraries of this process are turned to it, with a token that may write as "ann"."""
    with HubServer() as server:
        cache = tmp_path / "hf"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HUB_DATASETS_URL": server.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_CACHE": cache / "datasets",
            "DOWNLOADED_DATASETS_PATH": str(cache / "downloads"),
            "HF_UPDATE_DOWNLOAD_COUNTS": False,
        }.items():
            monkeypatch.setattr(datasets.config, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between the client's own attempts
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        datasets.disable_progress_bars()
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def environment(hub, tmp_path):
    """Of a user's process: the Hub's address and a token."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return environment | {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writer"}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shapes")


@pytest.fixture(scope="session")
def run(shapes, tmp_path_factory):
    """What two steps of training leave, with things beside it that must stay at home."""
    folder = tmp_path_factory.mktemp("run")
    model = save_tiny_model(folder / "start")
    (model / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    output = folder / "output"
    Trainer(make_arguments(shapes, model, output, supervision="sim", max_steps=2, log_every=1)).train()
    AcceleratorState._reset_state(True)
    for name in ("optimizer.pt", "training_args.bin", ".env", "notes.txt", "photo.jpg", "model.safetensors.bak", "evil.py"):
        (output / "model" / name).write_text("not for others")
        (output / name).write_text("not for others")
    return output
