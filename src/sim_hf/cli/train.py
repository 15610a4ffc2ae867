"""`sim-hf train`: parse, build, call. `scripts/train.py` is the same for `accelerate launch`."""

from __future__ import annotations

from collections.abc import Sequence

from sim_hf.hub.model import push_model
from sim_hf.hub.repository import HubRepository
from sim_hf.processes import process_state
from sim_hf.training.arguments import RunArguments, parse_arguments
from sim_hf.training.trainer import train


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv, prog="sim-hf train")
    run = arguments[-1]
    pushes = run.push_to_hub and process_state().is_main_process
    if pushes:  # what is wrong with the token or the name shows before the training and not after it
        HubRepository(str(run.hub_model_id), private=run.hub_private_repo or None, revision=run.hub_revision)
    train(arguments)
    if pushes:
        _push(run)
    return 0


def _push(run: RunArguments) -> None:
    if run.stop_after is not None and run.stop_after < run.max_steps:
        print(f"not pushed: the run was stopped at step {run.stop_after} of {run.max_steps}")
        return
    info = push_model(
        run.output_dir,
        str(run.hub_model_id),
        private=run.hub_private_repo or None,
        revision=run.hub_revision,
        license=run.hub_license,
    )
    print(f"pushed: {info.commit_url}")
