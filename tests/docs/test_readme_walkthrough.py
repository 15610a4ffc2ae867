"""A newcomer's way through the README: its own lines, in its order, each in a process of its own. `make e2e`.

Only these things differ from what stands there:
* runs are short (`SHORTER`), and the generated data set is small (`SMALLER`);
* `make demo` becomes the command that the Makefile gives to Python; `make test` is only looked up; `make space` starts the Space
  on a free port;
* `owner/...` is a repository of a Hub on loopback, and HF_TOKEN is set instead of `hf auth login`;
* the interpreter is the one that runs the tests, instead of the one of `source .venv/bin/activate`.
"""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from documents import README, ROOT, blocks, commands, sim_hf_arguments, split_variables

sys.path.append(str(ROOT / "tests" / "hub"))
from hub_server import HubServer

from sim_hf.data import write_scenes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
SHORTER = {
    "train": "--max_steps 3 --batch_size 2 --eval_every 0 --checkpoint_every 0 --log_every 1 --report_to none",
    "demo": "--steps 2",
}
SMALLER = {"scenes": {"200": "6", "40": "5"}}
LINKED = ("assets", "scripts", "spaces", "examples")


def steps_of_the_readme():
    """(where, what) of every Python block and every line of a shell block."""
    for block in blocks(README, "bash", "python"):
        lines = [block.text] if block.language == "python" else commands(block)
        for number, what in enumerate(lines):
            title = what if block.language == "bash" else [f"python-{block.note.removeprefix('needs: ') or 'block'}"]
            yield pytest.param(what, id=f"{block.line + number}-{'-'.join(title[:2])}")


class Newcomer:
    """A folder with the project's own beside what a newcomer makes, a Hub, and the Space once it is started."""

    def __init__(self, folder, hub):
        self.folder, self.hub, self.space = folder, hub, None
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        write_scenes(folder / "few-scenes", num_train=6, num_val=2, progress=False)
        self.environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_writer",
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def does(self, what):
        if isinstance(what, str):
            return self.runs([sys.executable, "-c", what])
        variables, words = split_variables(what)
        arguments = sim_hf_arguments(words)
        if words == ["make", "space"]:
            return self.starts_the_space(variables)
        if words[0] == "make" and arguments is None:
            return self.runs(["make", "--dry-run", "--directory", str(ROOT), *words[1:]])
        if words[0] == "source" or words[:3] == ["hf", "auth", "login"]:
            return None
        assert arguments is not None, f"do not know how to run {words}"
        command, *options = arguments
        options = [SMALLER.get(command, {}).get(option, option) for option in options]
        if arguments == ["demo"]:
            options = ["--data", "few-scenes"]
        return self.runs([sys.executable, "-m", "sim_hf", command, *options, *SHORTER.get(command, "").split()])

    def runs(self, words):
        words = [word.replace("owner/", "ann/").replace("127.0.0.1:7860", self.address) for word in words]
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    def starts_the_space(self, variables):
        port = self.address.split(":")[1]
        environment = {
            **self.environment,
            **variables,
            "GRADIO_SERVER_PORT": port,
            "GRADIO_TEMP_DIR": str(self.folder / "uploads"),
        }
        log = (self.folder / "space.log").open("w")
        program = "spaces/box-supervised-segmentation/app.py"
        self.space = subprocess.Popen([sys.executable, program], cwd=self.folder, env=environment, stdout=log, stderr=log)
        while self.space.poll() is None:
            try:
                if httpx.get(f"http://{self.address}/", timeout=60).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError((self.folder / "space.log").read_text())


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    with HubServer() as hub:
        newcomer = Newcomer(tmp_path_factory.mktemp("newcomer"), hub)
        yield newcomer
        if newcomer.space is not None:
            newcomer.space.terminate()
            newcomer.space.wait(timeout=60)


@pytest.mark.parametrize("what", steps_of_the_readme())
def test_step(what, newcomer):
    newcomer.does(what)


def test_what_the_readme_promises_is_there(newcomer):
    folder, hub = newcomer.folder, newcomer.hub
    made = ["runs/demo/overlays.jpg", "runs/demo/results.json", "masks.json", "labels.json", "runs/mine/results.json"]
    made += ["runs/mine/model/config.json", "runs/evaluation/results.json", "runs/predictions/predictions.json"]
    assert [name for name in made if not (folder / name).exists()] == []
    weights = (folder / "runs" / "mine" / "model" / "model.safetensors").read_bytes()
    assert hub.files("ann/model")["model.safetensors"] == weights
    assert any(name.endswith(".parquet") for name in hub.files("ann/boxes", "datasets"))
    assert any(name.endswith(".parquet") for name in hub.files("ann/masks", "datasets"))
    assert "app.py" in hub.files("ann/space", "spaces")
