"""`sim-hf push-space`: the folder of a Space (its program, requirements and card) to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sim_hf.cli.push import add_repository_options
from sim_hf.hub.space import push_space


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf push-space", description=__doc__)
    parser.add_argument("folder", type=Path, help="such as spaces/box-supervised-segmentation")
    parser.add_argument("repo_id", metavar="owner/name", help="repository; made if it is not there")
    parser.add_argument("--model", metavar="owner/name", help="model that the Space loads (its variable SIM_MODEL)")
    add_repository_options(parser, with_license=False)
    options = parser.parse_args(argv)
    info = push_space(
        options.folder,
        options.repo_id,
        model=options.model,
        private=options.private or None,
        revision=options.revision,
        message=options.message or "Upload Space",
    )
    print(f"pushed: {info.commit_url}")
    return 0
