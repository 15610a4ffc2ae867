"""Several data sets as one: classes joined by name, image ids kept apart."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import datasets as hf_datasets
import pyarrow.compute as pc

_ID_SPACING = 10**12


class MixedRows:
    """Map-style rows of one or more detection data sets (features as `load_coco` makes them).

    names: the union of the class names in the order of first appearance. A row's `objects.category` counts in `names`, and
    its `image_id` is unique over the sets (the first set keeps its own). A set listed twice is seen twice.
    """

    def __init__(self, datasets: list) -> None:
        if not datasets:
            raise ValueError("MixedRows needs at least one data set")
        # Pictures are read by our own reader (`SeededDataset` says why), so they stay undecoded here.
        self.datasets = [dataset.cast_column("image", hf_datasets.Image(decode=False)) for dataset in datasets]
        names: dict[str, int] = {}
        self.label_maps: list[list[int]] = []
        for dataset in datasets:
            own = dataset.features["objects"]["category"].feature.names
            self.label_maps.append([names.setdefault(name, len(names)) for name in own])
        self.names = list(names)
        self.ends = list(accumulate(len(dataset) for dataset in datasets))

    def __len__(self) -> int:
        return self.ends[-1]

    def object_counts(self) -> list[int]:
        """Objects of every row (crowds count as one), without reading the rest of the rows."""
        return [
            length
            for dataset in self.datasets
            for table in dataset.select_columns("objects").with_format("arrow").iter(batch_size=1000)
            for length in pc.list_value_length(pc.struct_field(table["objects"], "bbox")).to_pylist()
        ]

    def __getitem__(self, index: int) -> dict:
        part = bisect_right(self.ends, index)
        row = dict(self.datasets[part][index - (self.ends[part - 1] if part else 0)])
        objects = dict(row["objects"])
        objects["category"] = [self.label_maps[part][label] for label in objects["category"]]
        row["objects"] = objects
        row["image_id"] = row["image_id"] + part * _ID_SPACING
        return row
