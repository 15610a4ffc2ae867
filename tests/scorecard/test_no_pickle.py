"""31 no-pickle: every command in a process in which a pickle cannot be read or written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 1500  # seconds, on a loaded machine
WITHOUT_PICKLE = """
import pickle, sys
import numpy, torch, transformers, datasets, sim_hf.cli
from sim_hf.training import trainer

def refused(*arguments, **options):
    raise AssertionError("a pickle")

for module, names in ((pickle, ("load", "loads", "dump", "Unpickler")), (torch, ("load", "save")), (numpy, ("save", "savez"))):
    for name in names:
        setattr(module, name, refused)

def watch(event, arguments):
    if event == "pickle.find_class":
        raise AssertionError(f"a pickle asks for {arguments}")

sys.addaudithook(watch)
sys.exit(sim_hf.cli.main(sys.argv[1:]))
"""
SAFE_ENDINGS = {".json", ".jsonl", ".safetensors", ".jpg", ".png", ".md", ".html"}


@pytest.mark.e2e
def test_31_the_commands_work_without_pickle(command, data, tmp_path):
    program = tmp_path / "without_pickle.py"
    program.write_text(WITHOUT_PICKLE)

    def call(*words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        words = [sys.executable, str(program), *map(str, words)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]

    run, source = tmp_path / "run", ("--annotations", data / "instances_val.json", "--images", data / "images")
    call(*command(run, max_steps=2, supervision="sim", stop_after=1))
    call(*command(run, max_steps=2, supervision="sim", resume="auto"))
    call("evaluate", run / "model", *source, "--output", tmp_path / "out")
    call("predict", run / "model", data / "images", "--output", tmp_path / "out")
    call("label", run / "model", *source, "--output", tmp_path / "out" / "labels.json")
    written = [path for folder in (run, tmp_path / "out") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(written) > 10 and {path.suffix for path in written} <= SAFE_ENDINGS
