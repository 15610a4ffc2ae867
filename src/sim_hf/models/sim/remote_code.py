"""A model folder that people who have only transformers can load: `from_pretrained(folder, trust_remote_code=True)`.

The files of this folder of the package stand beside the weights, and entries in config.json say which class is where.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .image_processing_sim import SIMImageProcessor
from .modeling_sim import SIMForInstanceSegmentation

_AUTO_MAP = {
    "AutoConfig": "configuration_sim.SIMConfig",
    "AutoImageProcessor": "image_processing_sim.SIMImageProcessor",
    "AutoModel": "modeling_sim.SIMModel",
    "AutoModelForImageSegmentation": "modeling_sim.SIMForInstanceSegmentation",
    "AutoModelForInstanceSegmentation": "modeling_sim.SIMForInstanceSegmentation",
    "AutoModelForUniversalSegmentation": "modeling_sim.SIMForInstanceSegmentation",
}


def save_with_code(
    folder: str | Path,
    model: SIMForInstanceSegmentation,
    image_processor: SIMImageProcessor,
    *,
    pipelines: dict[str, type] | None = None,
) -> None:
    """`save_pretrained` of both, with their code. pipelines: task -> class whose module also goes along; it may import libraries
    only. With the package imported the folder loads like any other, by the package's own code.
    """
    save_parts(folder, model, image_processor, auto_map=_AUTO_MAP, pipelines=pipelines)
    for part in (model, model.config, image_processor):
        custom_object_save(part, Path(folder))


def save_parts(
    folder: str | Path,
    model: PreTrainedModel,
    image_processor: SIMImageProcessor,
    *,
    auto_map: dict[str, str],
    pipelines: dict[str, type] | None = None,
) -> None:
    """`save_pretrained` of both, with `auto_map` and the pipelines in config.json, and the code of the pipelines."""
    folder = Path(folder)
    config: Any = model.config
    before = {name: getattr(config, name, None) for name in ("auto_map", "custom_pipelines")}
    config.auto_map = dict(auto_map)
    config.custom_pipelines = {task: _pipeline_entry(cls) for task, cls in (pipelines or {}).items()}
    try:
        model.save_pretrained(folder)
    finally:
        for name, value in before.items():
            delattr(config, name) if value is None else setattr(config, name, value)
    image_processor.save_pretrained(folder)
    _leave_class_to_config(folder / "preprocessor_config.json")
    for pipeline in (pipelines or {}).values():
        custom_object_save(pipeline, folder)


def _pipeline_entry(cls: type) -> dict[str, Any]:
    module = cls.__module__.rpartition(".")[2]
    return {"impl": f"{module}.{cls.__name__}", "pt": ["AutoModelForInstanceSegmentation"], "type": "image"}


def _leave_class_to_config(path: Path) -> None:
    """Where the processor's file names no class, transformers asks config.json for it. An entry in the processor's own file
    works, too, but every pipeline then looks for a video processor in it, and asks at the terminal whether to run its code."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["image_processor_type"]
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
