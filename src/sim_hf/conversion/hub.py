"""Detection data sets of the Hub (or saved by `datasets`) as a conversion source: what `load_detection_dataset` reads."""

from __future__ import annotations

from typing import Any, cast

from datasets import Dataset

from sim_hf.conversion.rows import RowsSource
from sim_hf.conversion.source import SourceError
from sim_hf.data.hub import load_detection_dataset


class HubSource(RowsSource):
    """A data set with `image` and `objects` {bbox, category}.

    val_split: None for none. options: of `load_detection_dataset`, such as `revision` or `box_format`.
    """

    kind = "a Hub data set"

    def __init__(self, name: str, *, train_split: str = "train", val_split: str | None = "validation", **options: Any) -> None:
        self.name, self.options = name, options
        self.split_of = {"train": train_split, **({"val": val_split} if val_split else {})}
        super().__init__(list(self.split_of))
        for part, names in self.names_of.items():
            if names != self.names:
                raise SourceError(f"{name}: the classes of {self.split_of[part]} are not those of {train_split}")

    def load(self, part: str, *, with_masks: bool) -> Dataset:
        return cast(Dataset, load_detection_dataset(self.name, self.split_of[part], **self.options))
