"""What reads the folders of others: models, checkpoints of a run, and files of options.

The command line turns ValueError, OSError and RuntimeError into one line; anything else would be a traceback.
"""

from __future__ import annotations

import contextlib
import json

import torch
from PIL import Image
from workplace import FOLDER, written

from factories import save_tiny_model, tiny_processor
from sim_hf.models.architectures import architecture_of, load_model
from sim_hf.models.sim import SIMConfig, SIMImageProcessor
from sim_hf.training.arguments import parse_arguments
from sim_hf.training.checkpoint import CheckpointError, verify, write_manifest
from sim_hf.training.state_files import load_state, save_state

_LONGEST = 2000  # pixels to which a processor that was read is asked to resize


def checkpoint(data: bytes) -> None:
    """The bytes in the place of each file of a checkpoint in turn."""
    folder = FOLDER / "step-00000001"
    for name in ("training.json", "training.safetensors", "manifest.json"):
        for file, content in _CHECKPOINT.items():
            (folder / file).write_bytes(content)
        (folder / name).write_bytes(data)
        if not verify(folder):  # another way to write the same JSON is none of its business
            assert data == _CHECKPOINT[name] or (name == "manifest.json" and json.loads(data) == json.loads(_CHECKPOINT[name]))
        with contextlib.suppress(CheckpointError):
            load_state(folder / "training")


def config(data: bytes) -> None:
    """The configuration of a model folder."""
    path = written(data, "configured", "config.json")
    for read in (SIMConfig.from_pretrained, architecture_of):
        with contextlib.suppress(ValueError, OSError):
            read(path.parent)


def processor(data: bytes) -> None:
    """The preprocessing of a model folder, tried on a picture where it asks for no more pixels than a picture has."""
    path = written(data, "processed", "preprocessor_config.json")
    with contextlib.suppress(ValueError, OSError, RuntimeError):
        read = SIMImageProcessor.from_pretrained(path.parent)
        if max(*read.resized_size(16, 24), read.size_divisor) < _LONGEST:
            read(images=_PICTURE, return_tensors="pt")


def weights(data: bytes) -> None:
    """The header of the weights of a model folder: names, types, shapes and places of the tensors that follow."""
    written(len(data).to_bytes(8, "little") + data + _TENSORS, "model", "model.safetensors")
    with contextlib.suppress(ValueError, OSError, RuntimeError):
        load_model(FOLDER / "model")


def options(data: bytes) -> None:
    """A YAML file for --config."""
    path = written(data, "options.yaml")
    with contextlib.suppress(ValueError, OSError, SystemExit):
        parse_arguments(["--config", str(path), "--data", str(FOLDER), "--output_dir", str(FOLDER)])


def _written_checkpoint() -> dict[str, bytes]:
    folder = FOLDER / "step-00000001"
    folder.mkdir()
    save_state(folder / "training", {"a": torch.ones(2, 3), "b": [1, (2.5, None)], 3: "text"})
    write_manifest(folder, {"step": 1})
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _written_weights() -> tuple[bytes, bytes]:
    """Header and tensors of a small model, whose folder stays for `weights`."""
    content = (save_tiny_model(FOLDER / "model") / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


_PICTURE = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
_CHECKPOINT = _written_checkpoint()
_HEADER, _TENSORS = _written_weights()
SEEDS: dict[str, list[bytes]] = {
    "checkpoint": list(_CHECKPOINT.values()),
    "config": [json.dumps(SIMConfig.from_preset("tiny").to_dict()).encode()],
    "processor": [json.dumps(tiny_processor().to_dict()).encode(), b'{"size": {"shortest_edge": 32, "longest_edge": 64}}'],
    "weights": [_HEADER],
    "options": [b"max_steps: 5\nsupervision: sim\nlearning_rate: 5e-4\nreport_to: [none]\n", b"a: [1, {b: !!python/none x}]"],
}
TARGETS = {function.__name__: function for function in (checkpoint, config, processor, weights, options)}
