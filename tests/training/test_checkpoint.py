"""Checkpoints survive kills, full disks, flipped bits and ranks that fail."""

import errno
import importlib.metadata
import json
import logging
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from killing import flip_bit, in_child, kill_at_file_operation
from sim_hf.training.checkpoint import (
    CheckpointError,
    CheckpointManager,
    check_metadata,
    load_state,
    read_metadata,
    save_state,
    verify,
)


def write_weights(value: float):
    return lambda folder: save_state(folder / "training", {"weight": torch.full((64,), value)})


def weight_of(path: Path) -> float:
    return load_state(path / "training")["weight"][0].item()


@pytest.fixture
def manager(tmp_path) -> CheckpointManager:
    manager = CheckpointManager(tmp_path / "checkpoints")
    manager.save(1, write_weights(1.0), metadata={})
    return manager


def leftovers(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.root.iterdir() if not path.name.startswith("step-"))


# ---- saving, rotating, finding


def test_latest_is_none_before_the_first_save(tmp_path):
    assert CheckpointManager(tmp_path / "nothing").latest() is None


def test_save_gives_a_valid_folder_with_metadata_and_versions(manager):
    path = manager.save(20, write_weights(2.0), metadata={"world_size": 1, "config": "abc"})
    assert path.name == "step-00000020" and verify(path) == [] and manager.latest() == path
    metadata = read_metadata(path)
    assert (metadata["step"], metadata["world_size"], metadata["config"]) == (20, 1, "abc")
    assert metadata["versions"]["torch"] == importlib.metadata.version("torch")
    assert leftovers(manager) == []


def test_metadata_may_have_numbers_as_keys(manager):
    path = manager.save(2, write_weights(2.0), metadata={"id2label": {1: "a", 10: "b", 2: "c"}})
    assert manager.metadata(path)["id2label"] == {"1": "a", "10": "b", "2": "c"}


def test_steps_are_ordered_as_numbers(manager):
    for step in (999_999_99, 1_000_000_00):
        manager.save(step, write_weights(0.0), metadata={})
    assert manager.steps() == [100_000_000, 99_999_999]


def test_rotation_keeps_the_newest_and_the_protected(manager):
    for step in (2, 3, 4, 5):
        manager.save(step, write_weights(float(step)), metadata={}, protect={2})
    assert manager.steps() == [5, 4, 2]


def test_rotation_does_not_count_a_damaged_checkpoint(manager):
    flip_bit(manager.save(2, write_weights(2.0), metadata={}) / "training.safetensors")
    manager.save(3, write_weights(3.0), metadata={})
    assert manager.steps() == [3, 2, 1]


def test_keep_below_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        CheckpointManager(tmp_path, keep=1)


def test_saving_a_step_again_replaces_it(manager):
    manager.save(1, write_weights(7.0), metadata={})
    assert weight_of(manager.latest()) == 7.0 and leftovers(manager) == []


def test_later_checkpoints_are_set_aside_when_a_run_goes_back(manager):
    manager.save(5, write_weights(5.0), metadata={})
    manager.set_aside_later(1)
    assert manager.steps() == [1] and leftovers(manager) == ["set-aside-step-00000005"]


def test_what_a_killed_save_left_is_removed_by_the_next(manager):
    (manager.root / ".tmp-step-00000009" / "part").mkdir(parents=True)
    assert manager.latest().name == "step-00000001"
    manager.save(2, write_weights(2.0), metadata={})
    assert leftovers(manager) == []


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(manager):
    with pytest.raises(CheckpointError, match="plain JSON"):
        manager.save(2, write_weights(2.0), metadata={"path": Path("x")})
    assert manager.steps() == [1] and leftovers(manager) == []


# ---- damage


@pytest.mark.parametrize("name", ["training.safetensors", "training.json", "manifest.json"])
def test_flipped_bit_falls_back_to_the_previous_one_and_says_so(manager, caplog, name):
    flip_bit(manager.save(2, write_weights(2.0), metadata={}) / name)
    with caplog.at_level(logging.WARNING):
        assert manager.latest().name == "step-00000001"
    assert "skipping checkpoint step-00000002" in caplog.text and name in caplog.text


@pytest.mark.parametrize("name", ["training.safetensors", "training.json", "manifest.json"])
def test_deleted_file_is_named(manager, name):
    path = manager.save(2, write_weights(2.0), metadata={})
    (path / name).unlink()
    assert manager.latest().name == "step-00000001"
    with pytest.raises(CheckpointError, match=f"step-00000002/{name} is missing"):
        manager.metadata(path)


def test_truncated_file_is_named_with_its_size(manager):
    path = manager.root / "step-00000001"
    (path / "training.json").write_text("{")
    assert verify(path)[0].startswith("step-00000001/training.json has 1 bytes instead of ")


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(manager):
    flip_bit(manager.root / "step-00000001" / "training.json")
    with pytest.raises(CheckpointError, match=r"none is valid: step-00000001/training\.json"):
        manager.latest()


def test_renamed_folder_is_not_taken_for_another_step(manager):
    (manager.root / "step-00000001").rename(manager.root / "step-00000500")
    with pytest.raises(CheckpointError, match="of step 1"):
        manager.latest()


def test_path_that_is_no_checkpoint_is_refused(manager, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        manager.metadata(tmp_path / "nowhere")


def test_metadata_of_another_run_is_refused_field_by_field(manager, caplog):
    path = manager.save(2, write_weights(2.0), metadata={"world_size": 2, "config": "a", "sizes": (1, 2)})
    check_metadata(path, {"world_size": 2, "config": "a", "sizes": (1, 2)})
    with pytest.raises(CheckpointError, match=r"world_size: the checkpoint has 2, this run has 1; data: .*nothing"):
        check_metadata(path, {"world_size": 1, "data": "x"})
    with caplog.at_level(logging.WARNING):
        check_metadata(path, {"world_size": 1}, allow={"world_size"})
    assert "world_size: the checkpoint has 2, this run has 1" in caplog.text


# ---- several ranks


def save_on_two_ranks(manager: CheckpointManager, writers) -> list[Exception | None]:
    """Two ranks as threads with a barrier between them -> the error of each."""
    barrier = threading.Barrier(2, timeout=20)
    outcome: list[Exception | None] = [None, None]

    def rank(number: int) -> None:
        try:
            manager.save(2, writers[number], metadata={}, is_main=number == 0, barrier=barrier.wait)
        except Exception as error:
            outcome[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def test_every_rank_writes_its_own_files_into_one_checkpoint(manager):
    writers = [lambda folder, r=r: save_state(folder / f"rank{r}", {"rank": r}) for r in range(2)]
    assert save_on_two_ranks(manager, writers) == [None, None]
    files = json.loads((manager.latest() / "manifest.json").read_text())["files"]
    assert sorted(files) == ["rank0.json", "rank0.safetensors", "rank1.json", "rank1.safetensors"]


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_of_one_rank_fails_all_and_nobody_waits_for_ever(manager, failing):
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    errors = save_on_two_ranks(manager, [fail if r == failing else write_weights(2.0) for r in range(2)])
    assert [type(error) for error in errors] == [CheckpointError, CheckpointError]
    assert "no space" in str(errors[failing]) and manager.steps() == [1] and leftovers(manager) == []


def test_bug_in_the_writer_keeps_its_own_exception_and_leaves_nothing(manager):
    with pytest.raises(ZeroDivisionError):
        manager.save(2, lambda folder: 1 / 0, metadata={})
    assert manager.steps() == [1] and leftovers(manager) == []


# ---- kills and full disks, in child processes


@pytest.mark.parametrize(("step", "damaged"), [(3, None), (2, "step-00000001")], ids=["next", "only valid one again"])
def test_kill_at_any_file_operation_of_a_save_leaves_a_valid_checkpoint(tmp_path, monkeypatch, step, damaged):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it matters when the power fails, not for a kill
    kills = 0
    for number in range(1, 200):
        manager = CheckpointManager(tmp_path / str(number))
        for earlier in (1, 2):
            manager.save(earlier, write_weights(float(earlier)), metadata={})
        if damaged is not None:
            flip_bit(manager.root / damaged / "training.json")

        def save(manager=manager, number=number) -> None:
            kill_at_file_operation(number, manager.root)
            manager.save(step, write_weights(9.0), metadata={})

        status = in_child(save)
        latest = manager.latest()
        assert weight_of(latest) in ((2.0, 9.0) if status else (9.0,)), f"killed at operation {number}"
        manager.save(4, write_weights(4.0), metadata={})
        assert weight_of(manager.latest()) == 4.0 and leftovers(manager) == []
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert kills >= 15


@pytest.mark.parametrize("limit", [200, 20_000], ids=["json", "tensors"])
def test_full_disk_says_so_and_leaves_the_previous_checkpoint(manager, limit):
    """A limit on the file size stands for a full disk; it needs no root."""
    message = manager.root.parent / "message"
    state = {"w": torch.ones(50_000)}  # made here: torch's threads do not exist in a forked process

    def save() -> None:
        descriptor = os.open(message, os.O_WRONLY | os.O_CREAT)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            manager.save(2, lambda folder: save_state(folder / "training", state), metadata={})
        except CheckpointError as error:
            os.write(descriptor, str(error).encode()[:limit])
            os._exit(3)

    assert os.waitstatus_to_exitcode(in_child(save)) == 3
    assert "checkpoint of step 2 not written" in message.read_text()
    if limit > 1000:
        assert "free space" in message.read_text() and "step-00000001, is untouched" in message.read_text()
    assert manager.latest().name == "step-00000001" and leftovers(manager) == []
