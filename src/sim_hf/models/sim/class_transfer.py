"""A trained model for a new set of classes: what is known about equal class names stays, the rest starts fresh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .configuration_sim import SIMConfig
from .modeling_sim import SIMForInstanceSegmentation


@dataclass(frozen=True)
class ClassTransferReport:
    """Which classes kept the weights they had under the same name, and which start fresh."""

    source: str
    transferred: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        kept = f" ({', '.join(self.transferred)})" if self.transferred else ""
        new = f" ({', '.join(self.fresh)})" if self.fresh else ""
        return f"classes from {self.source}: {len(self.transferred)} transferred{kept}, {len(self.fresh)} fresh{new}"


def load_pretrained_for_classes(
    path: str | Path, id2label: Mapping[int, str], **overrides: Any
) -> tuple[SIMForInstanceSegmentation, ClassTransferReport]:
    """Load a SIM or Mask2Former checkpoint (folder or Hub id) for the classes of `id2label`.

    The class head's row of a class is copied where the checkpoint has a class of that name (case does not matter), the
    "no object" row always, other rows are drawn anew; so is the encoder of box prompts where `box_prompts=True` adds one, and
    `box_prompts=False` leaves it behind.
    Everything else must load completely: missing, unexpected, misshapen or non-finite tensors are a ValueError. overrides:
    fields of the configuration. float32, for training.
    """
    names = class_names(id2label)
    config = SIMConfig.from_pretrained(path, **{"category_ids": None, **overrides})
    same_prompts = config.box_prompts == SIMConfig.from_pretrained(path, category_ids=None).box_prompts
    model: Any = SIMForInstanceSegmentation.from_pretrained(
        path, config=config, dtype=torch.float32, reinitialize=() if same_prompts else [".box_prompt_encoder."]
    )
    old_head = model.class_predictor
    new_head = nn.Linear(old_head.in_features, len(names) + 1)
    model._init_weights(new_head)
    transferred, fresh = transfer_rows(old_head, new_head, config.id2label or {}, names)
    with torch.no_grad():
        new_head.weight[-1] = old_head.weight[-1]
        new_head.bias[-1] = old_head.bias[-1]
    model.class_predictor = new_head
    model.config.id2label = names
    model.config.label2id = {name: label for label, name in names.items()}
    return model, ClassTransferReport(str(path), transferred, fresh)


def class_names(id2label: Mapping[int, str]) -> dict[int, str]:
    """label -> name; labels that are not 0, 1, 2, ... are a ValueError."""
    names = {int(label): str(name) for label, name in id2label.items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"id2label must number the classes 0..{len(names) - 1}, got keys {sorted(names)}")
    return names


@torch.no_grad()
def transfer_rows(
    old_head: nn.Linear | nn.Conv2d,
    new_head: nn.Linear | nn.Conv2d,
    old_names: Mapping[Any, str],
    names: Mapping[int, str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy the rows of the classes that both have by name -> the names of these, and of the others."""
    assert old_head.bias is not None and new_head.bias is not None
    old_labels = {name.strip().lower(): label for label, name in old_names.items()}
    transferred, fresh = [], []
    for label, name in names.items():
        old_label = old_labels.get(name.strip().lower())
        if old_label is None:
            fresh.append(name)
            continue
        new_head.weight[label] = old_head.weight[old_label]
        new_head.bias[label] = old_head.bias[old_label]
        transferred.append(name)
    return tuple(transferred), tuple(fresh)
