"""A model folder that people who have only transformers can load: `from_pretrained(folder, trust_remote_code=True)`.

transformers follows imports of files of one folder only, so the files of `models/sim` that these use are put beside them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..sim.image_processing_sim import SIMImageProcessor
from ..sim.remote_code import save_parts
from .modeling_condinst import CondInstForInstanceSegmentation

_AUTO_MAP = {
    "AutoConfig": "configuration_condinst.CondInstConfig",
    "AutoImageProcessor": "image_processing_sim.SIMImageProcessor",
    "AutoModel": "modeling_condinst.CondInstModel",
    "AutoModelForImageSegmentation": "modeling_condinst.CondInstForInstanceSegmentation",
    "AutoModelForInstanceSegmentation": "modeling_condinst.CondInstForInstanceSegmentation",
    "AutoModelForUniversalSegmentation": "modeling_condinst.CondInstForInstanceSegmentation",
}
_FOLDERS = (Path(__file__).parent, Path(__file__).parents[1] / "sim")
_SHARED = re.compile(r"^from \.\.sim\.", re.MULTILINE)
_SIBLING = re.compile(r"^from \.(\w+) import", re.MULTILINE)


def save_with_code(
    folder: str | Path,
    model: CondInstForInstanceSegmentation,
    image_processor: SIMImageProcessor,
    *,
    pipelines: dict[str, type] | None = None,
) -> None:
    """As `sim_hf.models.sim.save_with_code`."""
    save_parts(folder, model, image_processor, auto_map=_AUTO_MAP, pipelines=pipelines)
    for name, text in _sources().items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def _sources() -> dict[str, str]:
    """File name -> source of everything that the classes of the auto map need, as files of one folder."""
    wanted = [entry.partition(".")[0] for entry in _AUTO_MAP.values()]
    found: dict[str, str] = {}
    while wanted:
        module = wanted.pop()
        if f"{module}.py" in found:
            continue
        path: Any = next(place / f"{module}.py" for place in _FOLDERS if (place / f"{module}.py").is_file())
        text = _SHARED.sub("from .", path.read_text(encoding="utf-8"))
        found[path.name] = text
        wanted += _SIBLING.findall(text)
    return found
