"""What a checkpoint of the Accelerate loop holds, and how a run goes on from one, bit for bit.

`training.*`: weights (in-memory names), optimiser, schedule, gradient scaler, teacher, prototypes, memory bank, step, place in
the data. `rank<r>.*`: each process's own random state. The manifest says which run it was, so that another one cannot
continue it by mistake.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sim_hf.training.checkpoint import CheckpointError, CheckpointManager
from sim_hf.training.sharding import gathered, load_network, load_optimizer
from sim_hf.training.state_files import load_state, save_state

# Options that may change between the parts of one run: they do not touch what is computed.
FREE_OPTIONS = {
    "output_dir", "resume", "stop_after", "log_every", "eval_every", "eval_limit", "checkpoint_every", "keep_checkpoints",
    "report_to", "num_workers", "num_threads", "export",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_license",
}  # fmt: skip
# Those that compute the same steps in more or less memory, up to the order of sums: a run that ran out of it may go on.
MEMORY_OPTIONS = {"gradient_accumulation_steps", "activation_checkpointing"}


def run_identity(*groups) -> dict[str, object]:
    """The options that decide what a run computes, by name."""
    options = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
    return {name: value for name, value in sorted(options.items()) if name not in FREE_OPTIONS}


def data_digest(data: Any) -> str | None:
    """sha256 of the ids, boxes, classes and masks of the training rows: a file may be annotated anew at the same path. None
    for a stream, which cannot be read twice."""
    if data.streaming:
        return None
    digest = hashlib.sha256(json.dumps(data.names).encode())
    for dataset in data.train.datasets:
        rows = dataset.select_columns(["image_id", "objects"]).with_format("arrow")[:]
        rows = rows.combine_chunks().replace_schema_metadata(None)  # how they were read does not matter
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)
        digest.update(sink.getvalue())
    return digest.hexdigest()


class Resumer:
    """Saves and restores a `Trainer`."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.manager = CheckpointManager(Path(trainer.run.output_dir) / "checkpoints", keep=trainer.run.keep_checkpoints)
        groups = (trainer.model_arguments, trainer.data_arguments, trainer.supervision, trainer.run)
        self.identity = run_identity(*groups)
        self.training_data = data_digest(trainer.data)
        self.defaults = run_identity(*(type(group)() for group in groups))

    def save(self) -> None:
        """Write the checkpoint of this step (all ranks call this)."""
        trainer = self.trainer
        accelerator = trainer.accelerator
        state = self._state()  # gathered before `write`, which the other ranks reach even when the main one fails

        def write(folder: Path) -> None:
            if accelerator.is_main_process:
                save_state(folder / "training", state)
            save_state(folder / f"rank{accelerator.process_index}", random_state())

        best = trainer.best["step"]
        self.manager.save(
            trainer.step.global_step,
            write,
            metadata={
                "world_size": accelerator.num_processes,
                "identity": self.identity,
                "training_data": self.training_data,
                "identity_sha256": hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest(),
                "best": trainer.best,
            },
            is_main=accelerator.is_main_process,
            barrier=accelerator.wait_for_everyone,
            protect=set() if best is None else {best},
        )

    def resume(self) -> None:
        """Restore what `--resume` asks for; an existing run is never overwritten without being asked."""
        trainer, wanted = self.trainer, self.trainer.run.resume
        if wanted is None:
            if self.manager.steps():
                raise CheckpointError(
                    f"{trainer.run.output_dir} already holds checkpoints: --resume auto goes on with them, "
                    "another --output_dir starts anew"
                )
            return
        path = self.manager.latest() if wanted == "auto" else Path(wanted)
        if path is None:
            trainer.say("nothing to resume yet, starting from step 0")
            return
        metadata = self.manager.metadata(path)
        self._check_same_run(path, metadata)
        self._load(load_state(path / "training"))
        own = path / f"rank{trainer.accelerator.process_index}"
        restore_random_state(load_state(own))
        trainer.best = metadata["best"]
        if trainer.accelerator.is_main_process:
            self.manager.set_aside_later(trainer.step.global_step)
        trainer.say(f"resumed from {path} at step {trainer.step.global_step}")

    def _check_same_run(self, path: Path, metadata: dict) -> None:
        # An option that is newer than the checkpoint had the effect of its default.
        saved = {name: _as_json(value) for name, value in self.defaults.items()} | metadata["identity"]
        changed = {
            name: f"{name}: {saved[name]!r} in the checkpoint, {value!r} now"
            for name, value in self.identity.items()
            if saved[name] != _as_json(value)
        }
        for name in MEMORY_OPTIONS & changed.keys():
            self.trainer.say(f"warning: the same steps, but not to the last bit: {changed.pop(name)}")
        differing = list(changed.values())
        saved_data = metadata.get("training_data")  # older checkpoints do not tell
        if saved_data is not None and saved_data != self.training_data:
            differing.append(f"training data: {saved_data[:8]} in the checkpoint, {(self.training_data or 'a stream')[:8]} now")
        world = self.trainer.accelerator.num_processes
        if metadata["world_size"] != world:
            differing.append(f"processes: {metadata['world_size']} in the checkpoint, {world} now")
        if differing:
            raise CheckpointError(f"{path} belongs to another run; " + "; ".join(differing))

    def _state(self) -> dict:
        trainer = self.trainer
        scaler, is_main = trainer.accelerator.scaler, trainer.accelerator.is_main_process
        return {
            "model": gathered(dict(trainer.student.state_dict()), keep=is_main),
            "optimizer": gathered(trainer.optimizer.state_dict(), keep=is_main),
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "step": trainer.step.training_state(),
            "data": trainer.batches.state_dict(),
        }

    def _load(self, state: dict) -> None:
        trainer = self.trainer
        load_network(trainer.student, state["model"])
        load_optimizer(trainer.optimizer, state["optimizer"])
        trainer.scheduler.load_state_dict(state["scheduler"])
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])
        trainer.step.load_training_state(state["step"])
        trainer.batches.load_state_dict(state["data"])


def random_state() -> dict:
    """Every generator that a process has, as plain data."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _as_json(value: object) -> object:
    return json.loads(json.dumps(value))
