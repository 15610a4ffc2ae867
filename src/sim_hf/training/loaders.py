"""Rows to batches: the endless stream of steps that the Accelerate loop reads, and the same stream cut into epochs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from sim_hf.data import DetectionCollator, MosaicDataset, SeededDataset, SeededIterable, StepSampler, TrainTransform
from sim_hf.data.collator import normalized
from sim_hf.training.arguments import DataArguments, RunArguments


class MicroBatches:
    """Endless iterator over optimiser steps; each item is the list of the step's micro-batches, on the device.

    `state_dict` counts the images that were *trained on* (workers read ahead); a resumed run goes on with the next one.
    """

    def __init__(
        self,
        data,
        arguments: DataArguments,
        run: RunArguments,
        processor,
        *,
        with_masks: bool,
        accelerator: Accelerator,
    ) -> None:
        self.device = accelerator.device
        self.arguments, self.processor, self.seed = arguments, processor, run.seed
        self.num_micro = run.gradient_accumulation_steps
        micro_size = run.batch_size // self.num_micro
        self.streaming = data.streaming
        self.steps_done = 0
        self.collate = train_collator(processor, as_bytes=True)
        self.common = {
            "num_workers": arguments.num_workers,
            "collate_fn": self.collate,
            "pin_memory": self.device.type == "cuda",
            "persistent_workers": arguments.num_workers > 0,
        }
        if self.streaming:
            rows = data.train
            if accelerator.num_processes > 1:
                rows = rows.shard(num_shards=accelerator.num_processes, index=accelerator.process_index)
            self.sampler = None
            samples = streamed_samples(rows, arguments, processor, with_masks=with_masks, seed=run.seed)
            self.loader = DataLoader(samples, batch_size=micro_size, drop_last=True, **self.common)
        else:
            self.sampler = StepSampler(
                len(data.train),
                micro_size,
                seed=run.seed,
                num_replicas=accelerator.num_processes,
                rank=accelerator.process_index,
            )
            self.read(data.train, with_masks=with_masks)

    def read(self, rows: Any, *, with_masks: bool) -> None:
        """Iterate over these rows from now on, in the same order and with the same augmentation: they are the same images."""
        if self.sampler is None:
            raise ValueError("a stream cannot be exchanged: it has no order that other rows could follow")
        samples = indexed_samples(rows, self.arguments, self.processor, with_masks=with_masks, seed=self.seed)
        self.loader = DataLoader(samples, batch_sampler=self.sampler, **self.common)

    def __iter__(self) -> Iterator[list[dict]]:
        stream = iter(self.loader)
        for _ in range(self.steps_done * self.num_micro if self.streaming else 0):
            next(stream)  # a stream has no index: skip what the interrupted run has seen
        while True:
            micro_batches = [self._on_device(next(stream)) for _ in range(self.num_micro)]
            yield micro_batches
            # The consumer comes back for the next step when this one is done.

    def _on_device(self, batch: dict) -> dict:
        """Bytes travel; they become the normalised batch there."""
        return normalized(_to_device(batch, self.device), self.collate.image_mean, self.collate.image_std)

    def advance(self) -> None:
        """One optimiser step was made with what was read last."""
        self.steps_done += 1
        if self.sampler is not None:
            self.sampler.advance(self.num_micro)

    def state_dict(self) -> dict:
        return {"steps_done": self.steps_done, "sampler": None if self.sampler is None else self.sampler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.steps_done = int(state["steps_done"])
        if (self.sampler is None) != (state["sampler"] is None):
            raise ValueError("the checkpoint was made with another kind of data set (streaming or not) than this run uses")
        if self.sampler is not None:
            self.sampler.load_state_dict(state["sampler"])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """A `StepSampler`'s stream in pieces of whole optimiser steps that cover the data set at least once, for a driver that
    counts epochs. Piece after piece it is the same stream, so an epoch's last step takes its missing images from the next."""

    def __init__(self, sampler: StepSampler, num_micro: int) -> None:
        self.sampler = sampler
        per_step = sampler.batch_size * sampler.num_replicas * num_micro
        self.num_batches = -(-sampler.dataset_size // per_step) * num_micro

    def __len__(self) -> int:
        """Batches of this process."""
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        self.sampler.position = epoch * self.num_batches * self.sampler.batch_size * self.sampler.num_replicas

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return islice(iter(self.sampler), self.num_batches)


class _EpochLoader(DataLoader):
    """Tells its batch sampler the epoch, as `transformers.Trainer` expects of a loader."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, EpochBatches):
            self.batch_sampler.set_epoch(epoch)


def epoch_loader(
    rows: Any,
    arguments: DataArguments,
    processor: Any,
    *,
    with_masks: bool,
    batch_size: int,
    num_micro: int,
    seed: int,
    num_processes: int = 1,
    process_index: int = 0,
    **options: Any,
) -> DataLoader:
    """Loader of this process's micro-batches, with a length when the rows have one. batch_size: of a micro-batch; options:
    of `DataLoader`."""
    options = {"collate_fn": train_collator(processor), **options}
    if isinstance(rows, datasets.IterableDataset):
        if num_processes > 1:
            rows = rows.shard(num_shards=num_processes, index=process_index)
        samples = streamed_samples(rows, arguments, processor, with_masks=with_masks, seed=seed)
        return _EpochLoader(samples, batch_size=batch_size, drop_last=True, **options)
    sampler = StepSampler(len(rows), batch_size, seed=seed, num_replicas=num_processes, rank=process_index)
    samples = indexed_samples(rows, arguments, processor, with_masks=with_masks, seed=seed)
    return _EpochLoader(samples, batch_sampler=EpochBatches(sampler, num_micro), **options)


def indexed_samples(rows: Any, arguments: DataArguments, processor, *, with_masks: bool, seed: int) -> SeededDataset:
    """Augmented samples of rows that can be indexed."""
    transform = train_transform(processor, arguments, with_masks=with_masks)
    if arguments.mosaic == 0:
        return SeededDataset(rows, transform, seed)
    red, green, blue = (round(255 * mean) for mean in processor.image_mean)
    return MosaicDataset(rows, transform, seed, probability=arguments.mosaic, background=(red, green, blue))


def streamed_samples(rows: Any, arguments: DataArguments, processor, *, with_masks: bool, seed: int) -> SeededIterable:
    """Augmented samples of rows that can only be read one after the other."""
    if arguments.mosaic > 0:
        raise ValueError(f"--mosaic {arguments.mosaic} draws images from the whole data set, so it does not go with --streaming")
    return SeededIterable(rows, train_transform(processor, arguments, with_masks=with_masks), seed)


def train_transform(processor, arguments: DataArguments, *, with_masks: bool) -> TrainTransform:
    """Augmentation at the processor's size."""
    strength = arguments.color_jitter
    return TrainTransform(
        int(processor.size["longest_edge"]),
        scale_range=(arguments.scale_min, arguments.scale_max),
        zoom=arguments.zoom,
        flip=arguments.flip,
        brightness=strength,
        contrast=strength,
        saturation=strength,
        hue=0.15 * strength,
        with_masks=with_masks,
    )


def train_collator(processor, *, as_bytes: bool = False) -> DetectionCollator:
    """Batches of one fixed size, so that a sample does not depend on its neighbours."""
    size = _round_up(int(processor.size["longest_edge"]), 32)
    return DetectionCollator(processor.image_mean, processor.image_std, pad_to=size, as_bytes=as_bytes)


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def _to_device(batch: dict, device: torch.device) -> dict:
    labels = [{name: value.to(device, non_blocking=True) for name, value in label.items()} for label in batch["labels"]]
    return {
        "pixel_values": batch["pixel_values"].to(device, non_blocking=True),
        "pixel_mask": batch["pixel_mask"].to(device, non_blocking=True),
        "labels": labels,
    }
