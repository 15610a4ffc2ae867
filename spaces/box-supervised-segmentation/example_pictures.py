"""Pictures to try: generated scenes with their boxes, and photographs that come with gradio itself.

`python example_pictures.py` renders the scenes of `examples/` anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gradio
from PIL import Image

from boxes import NamedBox, parse_boxes
from sim_hf.data import render_scene
from sim_hf.data.scenes import CATEGORY_IDS, CLASS_NAMES

FOLDER = Path(__file__).parent / "examples"
_SCENES = {"birds": 11, "starfish": 7, "wreath": 10}  # file name -> seed
_SIDE, _DIFFICULTY, _QUALITY = 512, 0.6, 92
_PHOTOGRAPHS = ("cheetah.jpg", "lion.jpg", "cheetah1.jpg")


@dataclass(frozen=True)
class Example:
    path: Path
    boxes: list[NamedBox]


def examples() -> list[Example]:
    """Photographs have no boxes (draw some); those that this gradio does not bring are left out."""
    photographs = Path(gradio.__file__).parent / "media_assets" / "images"
    scenes = [Example(FOLDER / f"{name}.jpg", parse_boxes((FOLDER / f"{name}.json").read_text())) for name in _SCENES]
    found = [photographs / name for name in _PHOTOGRAPHS if (photographs / name).is_file()]
    return scenes + [Example(path, []) for path in found]


def render(folder: Path = FOLDER) -> None:
    """A picture and its boxes in COCO's format for each scene."""
    folder.mkdir(exist_ok=True)
    for name, seed in _SCENES.items():
        scene = render_scene(seed, size=_SIDE, difficulty=_DIFFICULTY)
        Image.fromarray(scene.image).save(folder / f"{name}.jpg", quality=_QUALITY)
        height, width, _ = scene.image.shape
        document = {
            "images": [{"id": 1, "file_name": f"{name}.jpg", "width": width, "height": height}],
            "categories": [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)],
            "annotations": [
                {
                    "id": row + 1,
                    "image_id": 1,
                    "category_id": CATEGORY_IDS[int(label)],
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
                for row, (box, label) in enumerate(zip(scene.boxes, scene.class_labels, strict=True))
            ],
        }
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    render()
