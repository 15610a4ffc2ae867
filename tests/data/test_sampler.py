import itertools
import multiprocessing
import os
import signal

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sim_hf.data.augmentation import TrainTransform
from sim_hf.data.collator import DetectionCollator
from sim_hf.data.images import ImageError
from sim_hf.data.sampler import SeededDataset, SeededIterable, StepSampler, sample_seed


def _rows(num_images=6):
    generator = np.random.default_rng(0)
    rows = []
    for k in range(num_images):
        pixels = generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        objects = {"bbox": [[4.0, 4.0, 9.0, 9.0]], "category": [k], "iscrowd": [False]}
        rows.append({"image": Image.fromarray(pixels), "image_id": k, "objects": objects})
    return rows


def _first(sampler, count):
    return list(itertools.islice(sampler, count))


def _loader(dataset, sampler, num_workers, timeout=30):
    collator = DetectionCollator((0.5,) * 3, (0.2,) * 3, pad_to=32)
    context = "fork" if num_workers else None
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collator, num_workers=num_workers, multiprocessing_context=context,
        persistent_workers=num_workers > 0, timeout=timeout if num_workers else 0,
    )  # fmt: skip


def _stream(num_workers, count=7):
    dataset = SeededDataset(_rows(), TrainTransform(32), seed=5)
    iterator = iter(_loader(dataset, StepSampler(6, 2, seed=5), num_workers))
    return [next(iterator) for _ in range(count)]


def test_each_epoch_is_a_permutation_and_they_differ():
    stream = [pair for batch in _first(StepSampler(12, 4, seed=1), 6) for pair in batch]
    first, second = stream[:12], stream[12:]
    assert [epoch for epoch, _ in stream] == [0] * 12 + [1] * 12
    assert sorted(index for _, index in first) == list(range(12)) == sorted(index for _, index in second)
    assert [index for _, index in first] != [index for _, index in second]


def test_batches_reach_over_the_end_of_an_epoch_and_are_always_full():
    stream = _first(StepSampler(5, 3, seed=1), 5)
    assert {len(batch) for batch in stream} == {3}
    assert [epoch for batch in stream for epoch, _ in batch] == [0] * 5 + [1] * 5 + [2] * 5


def test_batch_may_be_larger_than_the_data_set():
    (batch,) = _first(StepSampler(2, 5, seed=1), 1)
    assert [epoch for epoch, _ in batch] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(("num_replicas", "batch_size"), [(2, 4), (4, 2), (8, 1)])
def test_ranks_together_see_what_one_process_with_the_joint_batch_sees(num_replicas, batch_size):
    joint = _first(StepSampler(11, 8, seed=3), 9)
    ranks = [_first(StepSampler(11, batch_size, seed=3, num_replicas=num_replicas, rank=rank), 9) for rank in range(num_replicas)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == joint


def test_micro_batches_of_a_step_are_the_joint_batch():
    joint = _first(StepSampler(11, 8, seed=3), 3)
    micro = _first(StepSampler(11, 2, seed=3), 12)
    assert [list(itertools.chain(*micro[4 * k : 4 * k + 4])) for k in range(3)] == joint


def test_resume_in_the_middle_of_an_epoch_continues_the_same_stream():
    reference = _first(StepSampler(10, 3, seed=2), 9)
    stopped = StepSampler(10, 3, seed=2)
    _first(stopped, 7)  # read ahead: what was handed out does not count
    stopped.advance(5)
    state = stopped.state_dict()
    assert (state["epoch"], state["position"]) == (1, 15)
    resumed = StepSampler(10, 3, seed=2)
    resumed.load_state_dict(state)
    assert _first(resumed, 4) == reference[5:]


def test_resume_with_another_number_of_ranks_continues_the_same_stream():
    reference = _first(StepSampler(10, 4, seed=2), 5)
    saved = StepSampler(10, 2, seed=2, num_replicas=2, rank=1)
    saved.advance(3)
    resumed = StepSampler(10, 4, seed=2)
    resumed.load_state_dict(saved.state_dict())
    assert _first(resumed, 2) == reference[3:]


@pytest.mark.parametrize("changed", [{"dataset_size": 11}, {"seed": 9}, {"shuffle": False}])
def test_resume_on_another_stream_is_refused(changed):
    state = StepSampler(10, 3, seed=2).state_dict() | changed
    with pytest.raises(ValueError, match="cannot resume"):
        StepSampler(10, 3, seed=2).load_state_dict(state)


def test_order_does_not_touch_or_depend_on_the_global_generators():
    state = torch.get_rng_state()
    first = _first(StepSampler(10, 5, seed=2), 3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(123)
    assert _first(StepSampler(10, 5, seed=2), 3) == first


def test_without_shuffling_the_order_is_the_data_sets():
    assert _first(StepSampler(4, 2, shuffle=False), 2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]


def test_impossible_samplers_are_refused():
    for arguments in ({"dataset_size": 0}, {"batch_size": 0}, {"rank": 2, "num_replicas": 2}):
        with pytest.raises(ValueError, match=r"empty|at least 1|rank must be"):
            StepSampler(**({"dataset_size": 4, "batch_size": 2} | arguments))


def test_sample_seeds_are_distinct_and_fixed():
    seeds = {sample_seed(s, e, i) for s in range(4) for e in range(4) for i in range(64)}
    assert len(seeds) == 4 * 4 * 64
    assert sample_seed(0, 1, 2) == sample_seed(0, 1, 2) < 2**63


def test_sample_stream_is_the_same_for_0_1_and_2_workers_across_epochs():
    reference = _stream(0)
    for num_workers in (1, 2):
        for expected, batch in zip(reference, _stream(num_workers), strict=True):
            assert torch.equal(expected["pixel_values"], batch["pixel_values"])
            for one, other in zip(expected["labels"], batch["labels"], strict=True):
                assert torch.equal(one["image_id"], other["image_id"]) and torch.equal(one["boxes"], other["boxes"])


def test_augmentation_of_an_image_changes_with_the_epoch():
    dataset = SeededDataset(_rows(), TrainTransform(32), seed=5)
    first, second = dataset[(0, 3)], dataset[(1, 3)]
    assert first["image"].shape != second["image"].shape or not torch.equal(first["image"], second["image"])
    assert torch.equal(dataset[(0, 3)]["image"], dataset[3]["image"])


def _read_on_after_killing_a_worker():
    """Exit code 0: no error; 1: an error while reading on; 2: an error before."""
    try:
        dataset = SeededDataset(_rows(), TrainTransform(32))
        iterator = iter(_loader(dataset, StepSampler(6, 2), num_workers=1, timeout=2))
        next(iterator)
        os.kill(iterator._workers[0].pid, signal.SIGKILL)
    except (RuntimeError, EOFError, OSError):
        os._exit(2)
    for _ in range(20):
        next(iterator)


def test_killed_worker_is_an_error_and_not_a_hang():
    # In a process of its own, whose exit code is all that it tells: torch raises from a signal handler, at any line.
    process = multiprocessing.get_context("fork").Process(target=_read_on_after_killing_a_worker)
    process.start()
    process.join(timeout=60)
    hangs = process.is_alive()
    process.kill()
    assert not hangs, "the loop hangs"
    assert process.exitcode == 1


def _as_hugging_face_dataset(tmp_path, rows):
    for row in rows:
        path = tmp_path / f"picture_{row['image_id']}.png"
        row["image"].save(path)
        row["image"] = str(path)
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_hugging_face_dataset_gives_the_same_samples_as_plain_rows(tmp_path):
    plain = SeededDataset(_rows(), TrainTransform(32), seed=5)
    converted = SeededDataset(_as_hugging_face_dataset(tmp_path, _rows()), TrainTransform(32), seed=5)
    for index in range(6):
        assert torch.equal(plain[index]["image"], converted[index]["image"])
        assert torch.equal(plain[index]["boxes"], converted[index]["boxes"])


def test_broken_picture_in_a_worker_is_an_error_that_names_the_file(tmp_path):
    converted = _as_hugging_face_dataset(tmp_path, _rows())
    (tmp_path / "picture_4.png").write_bytes(b"<html>")
    dataset = SeededDataset(converted, TrainTransform(32))
    with pytest.raises(ImageError, match=r"picture_4\.png"):
        for _ in zip(range(3), _loader(dataset, StepSampler(6, 2), num_workers=1), strict=False):
            pass


def test_streamed_images_are_the_same_for_any_number_of_workers():
    def stream(num_workers):
        source = datasets.Dataset.from_list(
            [{key: row[key] for key in ("image_id", "objects")} for row in _rows()]
        ).to_iterable_dataset(num_shards=2)
        pictures = [row["image"] for row in _rows()]
        source = source.map(lambda row: row | {"image": {"bytes": None, "path": None}})
        dataset = SeededIterable(source, _WithPicture(pictures), seed=5)
        context = "fork" if num_workers else None
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=context)
        return list(itertools.islice(loader, 12))

    one, two = ({(s["image_id"], float(s["image"].sum())) for s in stream(workers)} for workers in (0, 2))
    assert len(one) == 12, "two epochs, with another augmentation in each"
    assert one == two


class _WithPicture:
    def __init__(self, pictures):
        self.pictures, self.transform = pictures, TrainTransform(32)

    def __call__(self, example, *, seed=None):
        return self.transform(example | {"image": self.pictures[example["image_id"]]}, seed=seed)


def test_empty_stream_ends():
    assert list(SeededIterable([], TrainTransform(32))) == []
