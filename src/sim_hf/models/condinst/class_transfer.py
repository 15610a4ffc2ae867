"""A trained CondInst for a new set of classes, as `models/sim/class_transfer.py` does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..sim.class_transfer import ClassTransferReport, class_names, transfer_rows
from .configuration_condinst import CondInstConfig
from .fcos_head import ClassPredictor
from .modeling_condinst import CondInstForInstanceSegmentation


def load_pretrained_for_classes(
    path: str | Path, id2label: Mapping[int, str], **overrides: Any
) -> tuple[CondInstForInstanceSegmentation, ClassTransferReport]:
    """Load a CondInst checkpoint (folder or Hub id) for the classes of `id2label`.

    The class head's filter of a class is copied where the checkpoint has a class of that name (case does not matter), the others
    are drawn anew. Everything else must load completely. overrides: fields of the configuration. float32, for training.
    """
    names = class_names(id2label)
    config = CondInstConfig.from_pretrained(path, **{"category_ids": None, **overrides})
    model: Any = CondInstForInstanceSegmentation.from_pretrained(path, config=config, dtype=torch.float32)
    old_head = model.class_predictor
    model.class_predictor = ClassPredictor(old_head.in_channels, len(names))
    model._init_weights(model.class_predictor)
    transferred, fresh = transfer_rows(old_head, model.class_predictor, config.id2label or {}, names)
    model.config.id2label = names
    model.config.label2id = {name: label for label, name in names.items()}
    return model, ClassTransferReport(str(path), transferred, fresh)
