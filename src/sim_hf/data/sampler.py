"""Which image comes when, and with which randomness: pure functions of (seed, epoch, index).

Nothing here depends on the number of workers or ranks, and nothing on the state of a random generator, so a run that is
stopped and resumed, or moved to other machines, goes on with exactly the images and augmentations it would have had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler


class SampleTransform(Protocol):
    def __call__(self, example: Mapping[str, Any], *, seed: int | None = None) -> dict[str, Any]: ...


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one image in one epoch: well mixed, so that neighbours share nothing. `index` may be any integer."""
    return int(np.random.SeedSequence([seed, epoch, index % 2**63]).generate_state(1, np.uint64)[0] >> 1)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """An endless stream of batches of (epoch, index), for `DataLoader(batch_sampler=...)`.

    The stream is the epochs' permutations one after the other; a batch may reach over the end of an epoch, so all are full.
    Of every `num_replicas * batch_size` images rank r takes the r-th part: together the ranks see what one process with the
    joint batch would. `position` counts the images of the stream that all ranks together have *trained on*; workers read
    ahead, so the driver moves it with `advance()` after each batch. Iterating starts at `position` and does not move it.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
    ) -> None:
        if dataset_size < 1:
            raise ValueError("the data set is empty")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in 0..{num_replicas - 1}, got {rank}")
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.position = 0

    @property
    def epoch(self) -> int:
        return self.position // self.dataset_size

    def advance(self, num_batches: int = 1) -> None:
        """Count batches (of every rank) as trained on."""
        self.position += num_batches * self.batch_size * self.num_replicas

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.position + self.rank * self.batch_size
        cached_epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            batch = []
            for place in range(start, start + self.batch_size):
                epoch, offset = divmod(place, self.dataset_size)
                if epoch != cached_epoch:
                    cached_epoch, order = epoch, self._order(epoch)
                batch.append((epoch, int(order[offset])))
            yield batch
            start += self.num_replicas * self.batch_size

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.dataset_size)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, self.dataset_size))
        return torch.randperm(self.dataset_size, generator=generator).numpy()

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "dataset_size": self.dataset_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there. Batch size and number of ranks may differ from the saved run, the stream may not."""
        for name, here in (("dataset_size", self.dataset_size), ("seed", self.seed), ("shuffle", self.shuffle)):
            if state[name] != here:
                raise ValueError(f"cannot resume: the saved run has {name}={state[name]}, this one {here}")
        self.position = int(state["position"])


class SeededDataset(Dataset):
    """A map-style data set under a transform whose randomness is a function of (seed, epoch, index).

    Indexed by the (epoch, index) of `StepSampler`, which thereby tells persistent workers the epoch, or by a plain index,
    which means epoch 0. Pictures of a `datasets.Dataset` are read by our own reader, not by the library's: one set of rules
    for colours, limits and error messages.
    """

    def __init__(self, dataset: Any, transform: SampleTransform, seed: int = 0) -> None:
        if isinstance(dataset, datasets.Dataset) and isinstance(dataset.features.get("image"), datasets.Image):
            dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(index, sample_seed(self.seed, epoch, index))

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        """The row of that index under the transform with that seed."""
        return self.transform(self.dataset[index], seed=seed)


class SeededIterable(IterableDataset):
    """A streamed data set under a transform, epoch after epoch without end, so that workers never need to be told the epoch.

    A stream has no index that all workers agree on, so the randomness is a function of (seed, epoch, image id). The *order*
    is the stream's own and does depend on how it deals its shards to workers.
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]], transform: SampleTransform, seed: int = 0) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, is_empty = 0, False
        while not is_empty:
            if isinstance(self.dataset, datasets.IterableDataset):
                self.dataset.set_epoch(epoch)
            is_empty = True
            for example in self.dataset:
                is_empty = False
                yield self.transform(example, seed=sample_seed(self.seed, epoch, int(example["image_id"])))
            epoch += 1
