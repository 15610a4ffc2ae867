"""The ids that the categories had in the annotation file, kept with the data set.

A label is a position (0..K-1); results have to carry the file's own ids again. They are stored in the description of the
data set, the one place that selecting, shuffling, mapping, concatenating, saving and loading all carry along.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, List

_MARK = "sim_hf_category_ids"


def category_description(ids: list[int]) -> str:
    """What `category_ids` reads back from `dataset.info.description`."""
    return json.dumps({_MARK: ids})


def has_category_ids(dataset: Dataset | IterableDataset) -> bool:
    """Whether the data set carries the ids of its annotation file, which `load_coco` puts there."""
    return bool(_stored_ids(dataset.info.description or ""))


def category_ids(dataset: Dataset | IterableDataset) -> list[int]:
    """label -> category id of the annotation file; for data sets that never had one (from the Hub), the label itself."""
    num_labels = len(category_feature(dataset).names)
    stored = _stored_ids(dataset.info.description or "")
    if not stored:
        return list(range(num_labels))
    other = next((ids for ids in stored if ids != stored[0]), None)
    if other is not None:
        raise ValueError(f"data sets with different category ids were joined: {stored[0]!r:.80} and {other!r:.80}")
    if len(stored[0]) != num_labels:
        raise ValueError(f"the data set has {num_labels} categories, but ids of {len(stored[0])} were stored with it")
    return stored[0]


def category_feature(dataset: Dataset | IterableDataset) -> ClassLabel:
    """The ClassLabel of `objects.category`; ValueError saying what is there instead."""
    features = dataset.features
    if features is None or "objects" not in features:
        raise ValueError(f"the data set has no column `objects`, it has {list(features) if features else 'unknown columns'}")
    objects: Any = features["objects"]
    fields = objects.feature if isinstance(objects, List) else objects
    category = fields.get("category") if isinstance(fields, dict) else None
    label = category.feature if isinstance(category, List) else category
    if not isinstance(label, ClassLabel):
        raise ValueError(f"`objects.category` must hold ClassLabels, it holds {category}")
    return label


def _stored_ids(description: str) -> list[list[int]]:
    """Joining data sets joins their descriptions, with an empty line between different ones."""
    found = []
    for part in description.split("\n\n"):
        try:
            content = json.loads(part)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get(_MARK), list):
            found.append([int(i) for i in content[_MARK]])
    return found
