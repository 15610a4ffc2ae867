"""22 bad-image: a training run that meets a picture which cannot be read."""

import pytest

from factories import write_shapes
from sim_hf.cli import main

FAULTS = {
    "web page": b"<!DOCTYPE html><html>404</html>",
    "half": None,  # the first half of what was there
    "empty": b"",
}


def damage(folder, kind):
    """Every second picture, so that it comes in the first step."""
    for file in sorted((folder / "images").glob("?.png"))[::2]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if FAULTS[kind] is None else FAULTS[kind])
    return folder


@pytest.mark.parametrize("kind", FAULTS)
def test_22_training_names_the_picture_in_one_line(kind, command, tmp_path, capsys):
    data = damage(write_shapes(tmp_path / "data", num_train=4), kind)
    assert main(command(tmp_path / "run", data=data, supervision="boxinst")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and ".png" in lines[0] and str(data / "images") in lines[0], lines


@pytest.mark.e2e
def test_22_two_ranks_stop_and_name_the_picture(command, two_ranks, tmp_path):
    data = damage(write_shapes(tmp_path / "data", num_train=4), "half")
    done = two_ranks(command(tmp_path / "run", data=data, supervision="boxinst", batch_size=1)[1:])
    assert done.returncode != 0 and f"error: {data / 'images'}" in done.stderr.replace("cannot read ", ""), done.stderr[-3000:]
