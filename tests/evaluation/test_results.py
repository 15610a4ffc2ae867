"""results.json holds what is needed to get the numbers again, and nothing private."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim_hf.evaluation.results import format_table, git_state, typed_command, write_results

METRICS = {"segm/AP": 0.25, "segm/AP_large": None, "bbox/AP": 0.5, "bbox/AR10": 0.75, "segm/AP/cat": 0.125}


def written(path: Path, **extra) -> dict:
    write_results(path, METRICS, extra=extra)
    return json.loads(path.read_text(encoding="utf-8"))


def test_metrics_seed_versions_and_machine_are_written(tmp_path):
    record = written(tmp_path / "new" / "results.json", seed=3, note="äöü")
    assert {key: record[key] for key in METRICS} == METRICS and (record["seed"], record["note"]) == (3, "äöü")
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    packages = {"python", "torch", "torchvision", "transformers", "datasets", "accelerate", "timm", "pycocotools"}
    assert set(record["versions"]) == packages | {"sim_hf"}
    assert set(record["machine"]) == {"platform", "cpu", "cpu_count", "threads", "gpus"}
    assert record["time"].endswith("+00:00") and set(record["git"]) == {"commit", "dirty"}


def test_nothing_private_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "sim-hf"), "evaluate", "--data", "my data"])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", *sys.argv])
    record = written(tmp_path / "results.json")
    assert record["command"] == "sim-hf evaluate --data 'my data'"
    text = json.dumps(record)
    assert str(tmp_path) not in text and str(Path.cwd()) not in text and os.uname().nodename not in text.split('"')


@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        (
            ["/x/site-packages/sim_hf/cli/__main__.py", "train"],
            ["/v/python", "-m", "sim_hf.cli", "train"],
            "python -m sim_hf.cli train",
        ),
        (["scripts/train.py", "--seed", "1"], ["python", "scripts/train.py", "--seed", "1"], "python scripts/train.py --seed 1"),
        (["/home/me/run.py", "-m", "x"], ["python", "-W", "error", "/home/me/run.py", "-m", "x"], "python run.py -m x"),
        (["/v/bin/sim-hf"], ["/v/bin/python", "/v/bin/sim-hf"], "sim-hf"),
        ([""], ["python"], "python"),
        (["-c", "1"], ["python", "-c", "print()", "1"], "python -c ... 1"),
    ],
)
def test_command_is_given_as_it_was_typed(arguments, original, expected):
    assert typed_command(arguments, original) == expected


def test_old_file_survives_a_record_that_cannot_be_written(tmp_path):
    path = tmp_path / "results.json"
    before = written(path)
    with pytest.raises(TypeError):
        write_results(path, METRICS, extra={"bad": object()})
    with pytest.raises(ValueError):
        write_results(path, METRICS, extra={"bad": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == before and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metric_that_is_not_finite_is_refused_by_name(tmp_path, value):
    with pytest.raises(ValueError, match="'segm/AP'"):
        write_results(tmp_path / "results.json", {"segm/AP": value}, extra={})


def test_extra_cannot_replace_the_measured_entries(tmp_path):
    with pytest.raises(ValueError, match=r"\['segm/AP', 'versions'\]"):
        write_results(tmp_path / "results.json", METRICS, extra={"versions": {}, "segm/AP": 1.0})


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True).stdout


def test_git_state_follows_the_checkout_that_tracks_the_file(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("")
    assert git_state(module) == {"commit": "unknown", "dirty": None}
    git(tmp_path, "init", "-q")
    assert git_state(module)["commit"] == "unknown"  # in a repository, but not of it: an installed package
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert git_state(module) == {"commit": git(tmp_path, "rev-parse", "HEAD").strip(), "dirty": False}
    module.write_text("changed = True")
    assert git_state(module)["dirty"] is True


def test_missing_git_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {"commit": "unknown", "dirty": None}


def test_table_shows_masks_beside_boxes_in_percent():
    lines = [line.split() for line in format_table(METRICS).splitlines()]
    assert lines[0] == ["mask", "box"]
    assert ["AP", "25.00", "50.00"] in lines and ["AP_large", "n/a", "n/a"] in lines
    assert lines[-2:] == [["AR10", "n/a", "75.00"], ["AP/cat", "12.50", "n/a"]]
    assert len({len(line) for line in format_table(METRICS).splitlines()}) == 1
