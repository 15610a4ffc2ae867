"""The stream of optimiser steps: the same whatever the split, the ranks, the workers and the interruptions."""

from itertools import islice

import pytest
import torch
from accelerate import Accelerator

from factories import SIZE, tiny_processor, write_shapes
from sim_hf.data import StepSampler, load_coco
from sim_hf.data.mixture import MixedRows
from sim_hf.training.arguments import DataArguments, RunArguments
from sim_hf.training.assembly import RunData
from sim_hf.training.loaders import EpochBatches, MicroBatches, epoch_loader


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = write_shapes(tmp_path_factory.mktemp("shapes"), num_train=5, empty=(1,))
    return load_coco(folder / "images", folder / "instances_train.json", with_masks=True, cache_dir=folder / "cache")


def micro_batches(rows, *, streaming=False, with_masks=False, num_workers=0, **run):
    names = rows.features["objects"]["category"].feature.names
    train = rows.to_iterable_dataset() if streaming else MixedRows([rows])
    return MicroBatches(
        RunData(train, names, [3, 8], streaming=streaming),
        DataArguments(num_workers=num_workers, streaming=streaming, scale_min=0.9, scale_max=1.1),
        RunArguments(**{"batch_size": 4, **run}),
        tiny_processor(),
        with_masks=with_masks,
        accelerator=Accelerator(cpu=True),
    )


def images_of(step):
    return torch.cat([batch["pixel_values"] for batch in step])


def take(batches, count):
    steps = []
    for step in islice(iter(batches), count):
        steps.append(step)
        batches.advance()
    return steps


def test_a_step_is_a_list_of_micro_batches_of_one_size(rows):
    (step,) = take(micro_batches(rows, gradient_accumulation_steps=2), 1)
    assert [batch["pixel_values"].shape for batch in step] == [(2, 3, SIZE, SIZE)] * 2
    assert [len(batch["labels"]) for batch in step] == [2, 2]
    assert all("masks" not in label for batch in step for label in batch["labels"])


def test_masks_come_only_when_asked_for(rows):
    (step,) = take(micro_batches(rows, with_masks=True), 1)
    for label in step[0]["labels"]:
        assert label["masks"].shape == (len(label["boxes"]), SIZE, SIZE)
        assert label["has_mask"].all()


def test_an_image_without_instances_is_part_of_the_stream(rows):
    (step,) = take(micro_batches(rows, batch_size=5), 1)
    counts = {int(label["image_id"]): tuple(label["boxes"].shape) for label in step[0]["labels"]}
    assert counts[2] == (0, 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_split_into_micro_batches_does_not_change_the_images(rows, streaming):
    whole = take(micro_batches(rows, streaming=streaming), 3)
    split = take(micro_batches(rows, streaming=streaming, gradient_accumulation_steps=4), 3)
    assert all(torch.equal(images_of(a), images_of(b)) for a, b in zip(whole, split, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_stream_goes_on_with_the_next_step(rows, streaming):
    options = {"streaming": streaming, "gradient_accumulation_steps": 2}
    whole = take(micro_batches(rows, **options), 5)
    first = micro_batches(rows, **options)
    take(first, 2)
    resumed = micro_batches(rows, **options)
    resumed.load_state_dict(first.state_dict())
    for expected, found in zip(whole[2:], take(resumed, 3), strict=True):
        assert torch.equal(images_of(found), images_of(expected))


def test_what_workers_read_ahead_does_not_count_as_trained_on(rows):
    batches = micro_batches(rows, num_workers=1)
    stream = iter(batches)
    next(stream)
    assert batches.state_dict()["sampler"]["position"] == 0
    batches.advance()
    assert batches.state_dict()["sampler"]["position"] == 4
    assert torch.equal(images_of(next(stream)), images_of(take(micro_batches(rows), 2)[1]))


def test_a_checkpoint_of_a_streamed_run_does_not_fit_one_that_is_not(rows):
    with pytest.raises(ValueError, match="streaming"):
        micro_batches(rows).load_state_dict(micro_batches(rows, streaming=True).state_dict())


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_epochs_piece_together_to_the_endless_stream(num_replicas):
    def sampler(rank):
        return StepSampler(7, 2, seed=3, num_replicas=num_replicas, rank=rank)

    for rank in range(num_replicas):
        batches = EpochBatches(sampler(rank), num_micro=2)
        assert len(batches) == (4 if num_replicas == 1 else 2)  # whole steps of 4 or 8 images that cover 7
        found = []
        for epoch in range(3):
            batches.set_epoch(epoch)
            found += list(batches)
        assert found == list(islice(iter(sampler(rank)), 3 * len(batches)))


def test_the_epoch_loader_gives_the_images_of_the_accelerate_loop(rows):
    loader = epoch_loader(
        rows,
        DataArguments(scale_min=0.9, scale_max=1.1),
        tiny_processor(),
        with_masks=False,
        batch_size=2,
        num_micro=2,
        seed=0,
    )
    assert len(loader) == 4
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += [batch["pixel_values"] for batch in loader]
    expected = [batch["pixel_values"] for step in take(micro_batches(rows, gradient_accumulation_steps=2), 4) for batch in step]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_epoch_loader_streams(rows):
    loader = epoch_loader(
        rows.to_iterable_dataset(), DataArguments(), tiny_processor(), with_masks=False, batch_size=2, num_micro=1, seed=0
    )
    loader.set_epoch(0)
    with pytest.raises(TypeError):
        len(loader)
    ids = [int(label["image_id"]) for batch in islice(loader, 5) for label in batch["labels"]]
    assert sorted(ids[:5]) == sorted(ids[5:]) == [1, 2, 3, 4, 5]
