"""Rows to micro-batches on the device: the endless stream that the Accelerate loop reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from sim_hf.data import DetectionCollator, SeededDataset, SeededIterable, StepSampler, TrainTransform
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
        size = int(processor.size["longest_edge"])
        strength = arguments.color_jitter
        transform = TrainTransform(
            size,
            scale_range=(arguments.scale_min, arguments.scale_max),
            flip=arguments.flip,
            brightness=strength,
            contrast=strength,
            saturation=strength,
            hue=0.15 * strength,
            with_masks=with_masks,
        )
        self.device = accelerator.device
        self.num_micro = run.gradient_accumulation_steps
        micro_size = run.batch_size // self.num_micro
        self.streaming = data.streaming
        self.steps_done = 0
        collate = DetectionCollator(processor.image_mean, processor.image_std, pad_to=_round_up(size, 32))
        common = {
            "num_workers": arguments.num_workers,
            "collate_fn": collate,
            "pin_memory": self.device.type == "cuda",
            "persistent_workers": arguments.num_workers > 0,
        }
        if self.streaming:
            rows = data.train
            if accelerator.num_processes > 1:
                rows = rows.shard(num_shards=accelerator.num_processes, index=accelerator.process_index)
            self.sampler = None
            self.loader = DataLoader(SeededIterable(rows, transform, run.seed), batch_size=micro_size, drop_last=True, **common)
        else:
            self.sampler = StepSampler(
                len(data.train),
                micro_size,
                seed=run.seed,
                num_replicas=accelerator.num_processes,
                rank=accelerator.process_index,
            )
            self.loader = DataLoader(SeededDataset(data.train, transform, run.seed), batch_sampler=self.sampler, **common)

    def __iter__(self) -> Iterator[list[dict]]:
        stream = iter(self.loader)
        for _ in range(self.steps_done * self.num_micro if self.streaming else 0):
            next(stream)  # a stream has no index: skip what the interrupted run has seen
        while True:
            micro_batches = [_to_device(next(stream), self.device) for _ in range(self.num_micro)]
            yield micro_batches
            # The consumer comes back for the next step when this one is done.

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


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def _to_device(batch: dict, device: torch.device) -> dict:
    labels = [{name: value.to(device, non_blocking=True) for name, value in label.items()} for label in batch["labels"]]
    return {
        "pixel_values": batch["pixel_values"].to(device, non_blocking=True),
        "pixel_mask": batch["pixel_mask"].to(device, non_blocking=True),
        "labels": labels,
    }
