"""The architectures by the `model_type` of their configuration: the one place that lists them.

Everything above asks here for a model by a folder, a Hub id or the name of a preset, and gets the class that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim_hf.models import condinst, sim
from sim_hf.models.condinst.class_transfer import load_pretrained_for_classes as load_condinst_for_classes
from sim_hf.models.condinst.remote_code import save_with_code as save_condinst_with_code
from sim_hf.models.sim.class_transfer import ClassTransferReport
from sim_hf.models.sim.image_processing_sim import PRESET_SIZES as SIM_SIZES

# What every architecture's network is: its outputs hold a query model's predictions (docs/architecture.md).
InstanceSegmenter = sim.SIMForInstanceSegmentation | condinst.CondInstForInstanceSegmentation


@dataclass(frozen=True)
class Architecture:
    """title: what it is called. preset_sizes: of the images, by the name of the preset. load_for_classes: a checkpoint for other
    classes. save_with_code: a folder for people who have only transformers. not_exported: why there is no ONNX file of the
    network, where that is so."""

    title: str
    config: Any
    model: Any
    preset_sizes: Mapping[str, Mapping[str, int]]
    load_for_classes: Callable[..., tuple[Any, ClassTransferReport]]
    save_with_code: Callable[..., None]
    not_exported: str | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "sim": Architecture(
        "Mask2Former",
        sim.SIMConfig,
        sim.SIMForInstanceSegmentation,
        SIM_SIZES,
        sim.load_pretrained_for_classes,
        sim.save_with_code,
    ),
    "condinst": Architecture(
        "CondInst",
        condinst.CondInstConfig,
        condinst.CondInstForInstanceSegmentation,
        condinst.PRESET_SIZES,
        load_condinst_for_classes,
        save_condinst_with_code,
        not_exported="how many instances it finds depends on the picture, and an exported network has outputs of a known size",
    ),
}
PRESETS: tuple[str, ...] = tuple(name for architecture in ARCHITECTURES.values() for name in architecture.preset_sizes)


def architecture_of(source: str | Path, **hub_options: Any) -> Architecture:
    """Of a folder or a Hub id, by its config.json. What is none of ours is taken for a Mask2Former: SIM loads or refuses it."""
    fields, _ = sim.SIMConfig.get_config_dict(source, **hub_options)
    return ARCHITECTURES.get(str(fields.get("model_type")), ARCHITECTURES["sim"])


def architecture_of_preset(name: str) -> Architecture:
    for architecture in ARCHITECTURES.values():
        if name in architecture.preset_sizes:
            return architecture
    raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")


def load_model(source: str | Path, **options: Any) -> Any:
    """`from_pretrained` of the class that belongs to a folder or a Hub id."""
    hub_options = {name: options[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in options}
    return architecture_of(source, **hub_options).model.from_pretrained(source, **options)


def preset_processor(name: str) -> sim.SIMImageProcessor:
    """The image processor that belongs to a preset."""
    size: Any = dict(architecture_of_preset(name).preset_sizes[name])
    return sim.SIMImageProcessor(size=size)
