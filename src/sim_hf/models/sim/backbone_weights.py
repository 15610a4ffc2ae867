"""Pretrained backbone weights into a SIM model: strictly, so that a half-loaded backbone cannot pass unnoticed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from .modeling_sim import SIMForInstanceSegmentation

# What a classifier has on top of its features, by the first part of the name: timm's and transformers' names.
HEADS = frozenset(
    {
        *("classifier", "conv_head", "bn2", "norm_head", "norm", "fc", "fc_norm", "head", "head_dist", "layernorm", "pooler"),
        *("pre_logits", "last_linear", "final_conv", "distillation_classifier"),
    }
)
_PREFIXES = ("_backbone.", "timm_model.")
# Mask2Former adds a norm to each feature map of Swin; no classifier has them, they start as the identity.
_NEW_PARTS = ("hidden_states_norms.",)
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


@dataclass(frozen=True)
class BackboneReport:
    """What `load_backbone_weights` did."""

    source: str
    num_loaded: int
    ignored_heads: tuple[str, ...]
    newly_initialized: tuple[str, ...] = ()

    def __str__(self) -> str:
        heads = f"ignored the head ({', '.join(self.ignored_heads)})" if self.ignored_heads else "no head to ignore"
        new = f", {len(self.newly_initialized)} feature norms start fresh" if self.newly_initialized else ""
        return f"backbone weights: {self.num_loaded} tensors from {self.source}, {heads}{new}"


def load_backbone_weights(model: SIMForInstanceSegmentation, source: str | Path) -> BackboneReport:
    """Load a pretrained classifier's weights into the model's backbone.

    source: a .safetensors file, a folder with such files, or a Hub id ("timm/mobilenetv2_100.ra_in1k",
    "microsoft/resnet-50"). The names must be timm's for a timm backbone and transformers' for the others. A classifier
    head is left out; any other surplus, missing, misshapen or non-finite tensor is a ValueError that names it.
    """
    encoder = model.model.pixel_level_module.encoder
    tensors = _without_prefix(_read(source))
    if encoder.config.model_type == "timm_backbone":
        return _load_timm(encoder, tensors, str(source))
    return _load_transformers(encoder, tensors, str(source))


def _load_timm(encoder: PreTrainedModel, tensors: dict[str, Tensor], source: str) -> BackboneReport:
    features = encoder._backbone
    expected = features.state_dict()
    names = {name: name if name in tensors else _unflattened(name) for name in expected}
    found = {name: tensors[original] for name, original in names.items() if original in tensors}
    surplus = set(tensors) - set(names.values())
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    heads = _check(source, expected, found, missing, surplus)
    features.load_state_dict(found, strict=False)
    return BackboneReport(source, len(found), heads)


def _unflattened(name: str) -> str:
    """timm's name of a tensor before features_only flattened the containers: stages_0.blocks -> stages.0.blocks."""
    first, _, rest = name.partition(".")
    return ".".join((re.sub(r"_([0-9]+)$", r".\1", first), rest))


def _load_transformers(encoder: PreTrainedModel, tensors: dict[str, Tensor], source: str) -> BackboneReport:
    """transformers' own loader knows the old names of its models, so it does the renaming, on a second copy."""
    result: Any = type(encoder).from_pretrained(
        None,
        config=encoder.config,
        state_dict=dict(tensors),
        output_loading_info=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )
    loaded, info = result
    new = tuple(sorted(name for name in info["missing_keys"] if name.startswith(_NEW_PARTS)))
    missing = [
        name for name in info["missing_keys"] if not name.startswith(_NEW_PARTS) and not name.endswith("num_batches_tracked")
    ]
    mismatched = [f"{name} {tuple(came)} instead of {tuple(wanted)}" for name, came, wanted in info["mismatched_keys"]]
    found = {name: tensor for name, tensor in loaded.state_dict().items() if name not in {*missing, *new}}
    heads = _check(source, encoder.state_dict(), found, missing, set(info["unexpected_keys"]), mismatched)
    encoder.load_state_dict(found, strict=False)
    return BackboneReport(source, len(found), heads, new)


def _check(
    source: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    missing: list[str],
    surplus: set[str],
    mismatched: list[str] | None = None,
) -> tuple[str, ...]:
    """Raise on anything but a classifier head that is left over -> the names of that head."""
    problems = {
        "missing": missing,
        "unexpected": sorted(name for name in surplus if not _is_head(name)),
        "misshapen": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in found.items()
            if tensor.shape != expected[name].shape
        ]
        + (mismatched or []),
        "not finite": [name for name, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()],
    }
    found_problems = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found_problems:
        raise ValueError(f"{source} does not fit this backbone; {'; '.join(found_problems)}")
    return tuple(sorted({_head_part(name) for name in surplus}))


def _head_part(name: str) -> str:
    parts = name.split(".")
    return next((part for part in parts[:2] if part in HEADS), parts[0])


def _is_head(name: str) -> bool:
    return _head_part(name) in HEADS


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _read(source: str | Path) -> dict[str, Tensor]:
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{source} is not a .safetensors file; pickled weights can run code and are not read")
        return _read_file(path)
    if not path.is_dir():
        if path.is_absolute() or str(source).count("/") != 1:
            raise ValueError(f"{source} is no file, no folder and no Hub id (owner/name)")
        path = Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    return _read_folder(path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return _read_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: tensor for file in _indexed(index) for name, tensor in _read_file(folder / file).items()}
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    hint = f"; pickled weights can run code and are not read ({', '.join(pickles)})" if pickles else ""
    raise ValueError(f"{folder} has no model.safetensors{hint}")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _indexed(index: Path) -> list[str]:
    """The files over which the tensors are spread; they lie beside the index."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(file == Path(file).name for file in files):
            raise ValueError("weight_map names files outside the folder")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error})") from error
    return sorted(files)
