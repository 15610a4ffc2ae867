"""Push COCO files as a `datasets` data set: boxes, or boxes with masks, pictures included, with a card, in one commit."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import orjson
from datasets import Dataset, Features, Image, List, Value
from datasets.table import embed_table_storage
from huggingface_hub import CommitInfo

from sim_hf.data.coco import load_coco
from sim_hf.hub.allowed_files import CARD, DATA_FILES
from sim_hf.hub.dataset_card import write_dataset_card
from sim_hf.hub.repository import HubRepository

SHARD_BYTES = 500_000_000  # of pictures; what the Hub's viewer likes
BATCH_ROWS = 100  # pictures that lie in memory at once


def coco_dataset(
    images: str | Path,
    annotations: str | Path,
    *,
    with_masks: bool = False,
    box_format: str = "xywh",
    cache_dir: str | Path | None = None,
) -> Dataset:
    """A COCO file as rows for the Hub: those of `load_coco`, and with masks also `objects.score`, when `sim-hf label` wrote any.

    Masks are COCO segmentations as JSON text, one for each object, "" for none.
    """
    rows = load_coco(images, annotations, with_masks=with_masks, box_format=box_format, cache_dir=cache_dir)
    scores = _scores(Path(annotations)) if with_masks else {}
    if not scores:
        return rows
    objects = {**rows.features["objects"], "score": List(Value("float32"))}
    features = Features({**rows.features, "objects": objects})

    def add_scores(row: dict) -> dict:
        return {"objects": {**row["objects"], "score": [scores.get(number) for number in row["objects"]["id"]]}}

    undecoded = rows.cast_column("image", Image(decode=False))
    undecoded_features = Features({**features, "image": Image(decode=False)})
    return undecoded.map(add_scores, features=undecoded_features, keep_in_memory=True).cast_column("image", Image())


def push_dataset(
    splits: Mapping[str, Dataset],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str = "unknown",
    message: str = "Upload data set",
    token: str | None = None,
) -> CommitInfo:
    """`splits` (name -> rows of `load_coco` or `coco_dataset`) as parquet with the pictures inside, and a card.

    One commit replaces what an earlier push left. Shards go up one by one, so only one lies on the disk; none shows before.

    license: of the pictures and annotations together.
    """
    card = write_dataset_card(repo_id, splits, license=license)
    repository = HubRepository(repo_id, "dataset", private=private, revision=revision, token=token)
    with tempfile.TemporaryDirectory() as staging:
        for split, rows in splits.items():
            for name, file in _shards(split, rows, Path(staging)):
                repository.upload(name, file)
                file.unlink()
    return repository.commit({CARD: str(card).encode()}, message, replaces=DATA_FILES)


def _shards(split: str, rows: Dataset, folder: Path) -> Iterator[tuple[str, Path]]:
    count = max(1, math.ceil(_picture_bytes(rows) / SHARD_BYTES))
    for index in range(count):
        shard = rows.shard(count, index, contiguous=True).with_format("arrow")
        whole = shard.map(embed_table_storage, batched=True, batch_size=BATCH_ROWS, keep_in_memory=True)
        file = folder / f"{split}-{index:05d}-of-{count:05d}.parquet"
        whole.to_parquet(file, batch_size=BATCH_ROWS)
        yield f"data/{file.name}", file


def _picture_bytes(rows: Dataset) -> int:
    pictures = cast(Iterable[Any], rows.select_columns(["image"]).cast_column("image", Image(decode=False)))
    return sum(len(row["image"]["bytes"] or b"") or os.path.getsize(row["image"]["path"]) for row in pictures)


def _scores(annotations: Path) -> dict[int, float]:
    """Annotation id -> how sure its generated mask is."""
    document = orjson.loads(annotations.read_bytes())
    return {annotation["id"]: annotation["score"] for annotation in document["annotations"] if "score" in annotation}
