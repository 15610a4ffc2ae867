"""The card of a data set: what the columns hold, how many rows there are, and where masks come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData

from sim_hf.data.category_ids import category_description, category_feature, category_ids

TEMPLATE = Path(__file__).with_name("dataset_card.md")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


def write_dataset_card(repo_id: str, splits: Mapping[str, Dataset], *, license: str = "unknown") -> DatasetCard:
    """The card of the rows in `splits`. ValueError when there are none, or their classes differ."""
    if not splits:
        raise ValueError("a data set needs at least one split")
    first = next(iter(splits.values()))
    classes = list(zip(category_ids(first), category_feature(first).names, strict=True))
    for split, rows in splits.items():
        if rows.features != first.features:
            raise ValueError(f"the split {split!r} has other classes or columns than the first one")
    objects = first.features["objects"]
    name = repo_id.rpartition("/")[2]
    total = sum(map(len, splits.values()))
    data = DatasetCardData(
        license=license,
        task_categories=["object-detection", *(["image-segmentation"] if "segmentation" in objects else [])],
        size_categories=next((text for limit, text in _SIZES if total < limit), "n>10M"),
        tags=["instance-segmentation" if "segmentation" in objects else "bounding-boxes", "coco", "sim"],
        pretty_name=name,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
        # What `datasets` makes the description of the loaded data set: where `category_ids` looks for the ids of the file.
        dataset_info={"config_name": "default", "description": category_description(category_ids(first))},
    )
    return DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        split=next(iter(splits)),
        counts=[(split, len(rows), *_num_objects(rows)) for split, rows in splits.items()],
        classes=classes,
        with_masks="segmentation" in objects,
        generated="score" in objects,
        license=license,
    )


def _num_objects(rows: Dataset) -> tuple[int, int]:
    """(boxes, masks)"""
    objects = rows.with_format("arrow")[:]["objects"].combine_chunks()
    boxes = int(np.sum([len(row) for row in objects.field("id")]))
    if "segmentation" not in rows.features["objects"]:
        return boxes, 0
    return boxes, sum(bool(text) for row in objects.field("segmentation").to_pylist() for text in row)
