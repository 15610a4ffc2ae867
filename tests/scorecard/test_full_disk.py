"""19 disk-full: a disk without a byte left when a log line, a checkpoint or the model is written."""

import contextlib
import subprocess
from pathlib import Path

import pytest

from sim_hf.cli import main
from sim_hf.training import trainer as trainer_module
from sim_hf.training.checkpoint import verify
from sim_hf.training.resume import Resumer


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB, which only root may make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip("a file system of its own needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    with (disk / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))


NAMED = {"save": "step-00000001, is untouched", "export": "run/best"}
MOMENTS = {"save": (Resumer, "save"), "export": (trainer_module, "export_model")}


@pytest.mark.parametrize("moment", MOMENTS)
def test_19_a_full_disk_at_each_moment_of_a_run(moment, small_disk, command, monkeypatch, capsys):
    owner, name = MOMENTS[moment]
    original, calls = getattr(owner, name), []

    def on_a_full_disk(*arguments, **options):
        calls.append(1)
        if moment == "export" or len(calls) == 2:
            fill(small_disk)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, on_a_full_disk)
    output = small_disk / "run"
    assert main(command(output, max_steps=2, checkpoint_every=0.5, supervision="boxinst")) == 2
    error = capsys.readouterr().err
    assert "space" in error.lower() and "Traceback" not in error and NAMED[moment] in error, error
    checkpoints = sorted((output / "checkpoints").iterdir())
    assert verify(checkpoints[0]) == [] and all(path.name.startswith("step-") for path in checkpoints)
    assert [path for path in output.rglob("*") if ".tmp" in path.name or path.name.startswith(".model")] == []
    (small_disk / "filler").unlink()
    monkeypatch.setattr(owner, name, original)
    assert main(command(output, max_steps=2, checkpoint_every=0.5, supervision="boxinst", resume="auto")) == 0
    assert (output / "model" / "model.safetensors").is_file()


def test_19_a_log_that_cannot_be_written(command, tmp_path, capsys):
    """/dev/full is a full disk for everybody."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert main(command(tmp_path, max_steps=1, supervision="boxinst")) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "metrics.jsonl" in error and "Traceback" not in error
