"""17 stale-resume: a checkpoint of a real run with a file gone or damaged, or of other data."""

import json
import shutil

import pytest

from factories import make_arguments, write_shapes
from killing import flip_bit
from sim_hf.training.state_files import CheckpointError
from sim_hf.training.trainer import Trainer

FILES = ("manifest.json", "training.json", "training.safetensors", "rank0.json", "rank0.safetensors")
OPTIONS = {"max_steps": 3, "checkpoint_every": 1 / 3, "supervision": "boxinst"}


@pytest.fixture(scope="module")
def run(data, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stale") / "run"
    Trainer(make_arguments(data, model, folder, **OPTIONS, stop_after=2)).train()
    assert sorted(file.name for file in (folder / "checkpoints" / "step-00000002").iterdir()) == sorted(FILES)
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize("damage", [flip_bit, lambda file: file.unlink()], ids=["flipped bit", "deleted"])
@pytest.mark.parametrize("name", FILES)
def test_17_each_file_of_a_real_checkpoint(name, damage, run, data, model, tmp_path, caplog):
    """The previous checkpoint is taken, with a warning; the damaged one cannot be named; without a sound one it is an error."""
    folder = shutil.copytree(run, tmp_path / "run") / "checkpoints"
    damage(folder / "step-00000002" / name)
    trainer = Trainer(make_arguments(data, model, tmp_path / "run", **OPTIONS, resume="auto"))
    trainer.resumer.resume()
    assert trainer.step.global_step == 1 and f"step-00000002/{name}" in caplog.text
    shutil.rmtree(folder)
    shutil.copytree(run / "checkpoints", folder)
    for step in ("step-00000001", "step-00000002"):
        damage(folder / step / name)
    for resume in ("auto", str(folder / "step-00000002")):
        trainer.run.resume = resume
        with pytest.raises(CheckpointError, match=name):
            trainer.resumer.resume()


def _moved_box(content):
    content["annotations"][0]["bbox"][0] += 1


def _other_picture(content):
    content["images"][0]["id"], content["images"][1]["id"] = content["images"][1]["id"], content["images"][0]["id"]


def _without_its_last(content):
    last = content["images"].pop()["id"]
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] != last]


@pytest.mark.parametrize("change", [_moved_box, _other_picture, _without_its_last])
def test_17_other_data_or_number_of_processes(change, model, tmp_path):
    """At the same path, as when a file was annotated anew between the parts of a run."""
    data = write_shapes(tmp_path / "data", num_train=4)
    Trainer(make_arguments(data, model, tmp_path / "run", **OPTIONS, stop_after=1)).train()
    resumed = make_arguments(data, model, tmp_path / "run", **OPTIONS, resume="auto")
    trainer = Trainer(resumed)
    trainer.accelerator.state.num_processes = 2
    with pytest.raises(CheckpointError, match="processes: 1 in the checkpoint, 2 now"):
        trainer.resumer.resume()
    trainer.accelerator.state.num_processes = 1
    file = data / "instances_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"training data: .* in the checkpoint, .* now"):
        Trainer(resumed).resumer.resume()
