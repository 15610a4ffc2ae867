"""Everything that reads bytes of others, as `target(data: bytes) -> None`: it returns, or raises what is no finding.

A finding is any other exception, a crash, or more memory than `__main__` allows. `SEEDS[name]` are what mutation starts from.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
SPACE = TESTS.parent / "spaces" / "box-supervised-segmentation"
sys.path[:0] = [path for path in (str(TESTS), str(SPACE)) if path not in sys.path]

from boxes import boxes_inside, parse_boxes  # noqa: E402
from coco_faults import ALL_FAULTS, encode, sound_document  # noqa: E402
from sim_hf.data import ImageError, load_coco, read_image, read_image_size, validate_coco  # noqa: E402
from sim_hf.data.annotation_file import AnnotationError  # noqa: E402
from sim_hf.models.sim import SIMConfig  # noqa: E402
from sim_hf.training.arguments import parse_arguments  # noqa: E402
from sim_hf.training.checkpoint import CheckpointError, verify, write_manifest  # noqa: E402
from sim_hf.training.state_files import load_state, save_state  # noqa: E402
from uploads import UploadError, read_upload  # noqa: E402

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
for number in (1, 2):
    Image.new("RGB", (100, 80)).save(_FOLDER / f"{number}.png")


def annotations(data: bytes) -> None:
    """The check never raises, and the loader takes what the check takes and nothing else."""
    path = _FOLDER / "annotations.json"
    path.write_bytes(data)
    for with_masks in (False, True):
        report = validate_coco(path, _FOLDER, with_masks=with_masks)
        str(report), report.to_json()
        assert report.exit_code in (0, 1, 2)
        try:
            rows = load_coco(_FOLDER, path, with_masks=with_masks, cache_dir=_FOLDER / "cache")
        except AnnotationError as error:
            assert report.exit_code != 0, f"the check takes it, the loader does not: {error}"
            assert "\n" not in str(error)
        else:
            assert report.exit_code == 0, f"the loader takes it, the check does not: {report}"
            assert len(rows) == report.num_images


def images(data: bytes) -> None:
    for read in (read_image, read_image_size):
        with contextlib.suppress(ImageError):
            read(data)


def upload(data: bytes) -> None:
    path = _FOLDER / "upload.png"
    path.write_bytes(data)
    with contextlib.suppress(UploadError):
        read_upload(path)


def boxes(data: bytes) -> None:
    with contextlib.suppress(UploadError):
        boxes_inside(parse_boxes(data.decode("utf-8", "replace")), (480, 640))


def checkpoint(data: bytes) -> None:
    """The bytes in the place of each file of a checkpoint in turn."""
    for name in ("training.json", "training.safetensors", "manifest.json"):
        folder = _FOLDER / "step-00000001"
        for file, content in _CHECKPOINT.items():
            (folder / file).write_bytes(content)
        (folder / name).write_bytes(data)
        if not verify(folder):  # another way to write the same JSON is none of its business
            assert data == _CHECKPOINT[name] or (name == "manifest.json" and json.loads(data) == json.loads(_CHECKPOINT[name]))
        with contextlib.suppress(CheckpointError):
            load_state(folder / "training")


def config(data: bytes) -> None:
    """The configuration of a model folder."""
    path = _FOLDER / "model" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with contextlib.suppress(ValueError, OSError):
        SIMConfig.from_pretrained(path.parent)


def options(data: bytes) -> None:
    """A YAML file for --config."""
    path = _FOLDER / "options.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ValueError, OSError, SystemExit):
        parse_arguments(["--config", str(path), "--data", str(_FOLDER), "--output_dir", str(_FOLDER)])


def _written_checkpoint() -> dict[str, bytes]:
    folder = _FOLDER / "step-00000001"
    folder.mkdir()
    save_state(folder / "training", {"a": torch.ones(2, 3), "b": [1, (2.5, None)], 3: "text"})
    write_manifest(folder, {"step": 1})
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _picture(kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert(mode).save(stream, kind)
    return stream.getvalue()


_CHECKPOINT = _written_checkpoint()
TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (annotations, images, upload, boxes, checkpoint, config, options)
}
_PICTURES = [_picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")] + [
    _picture("PNG", "P"),
    _picture("PNG", "LA"),
]
SEEDS: dict[str, list[bytes]] = {
    "annotations": [encode(sound_document()), *(fault.content for fault in ALL_FAULTS if len(fault.content) < 10_000)],
    "images": _PICTURES,
    "upload": _PICTURES,
    "boxes": [b"1 2 30 40", b"1,2,30,40\n5;6;70;80", b"[[1, 2, 30, 40]]", encode(sound_document())],
    "checkpoint": list(_CHECKPOINT.values()),
    "config": [json.dumps(SIMConfig.from_preset("tiny").to_dict()).encode()],
    "options": [b"max_steps: 5\nsupervision: sim\nlearning_rate: 5e-4\nreport_to: [none]\n", b"a: [1, {b: !!python/none x}]"],
}
