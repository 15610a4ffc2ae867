"""`sim-hf push`: a trained model with its card to the Hugging Face Hub, in one commit.

Only weights, configuration, processor, card and its picture go there (and code, if asked for): no checkpoints, logs or data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sim_hf.hub.model import push_model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf push", description=__doc__)
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="output_dir of a run, or the folder of a model")
    parser.add_argument("repo_id", metavar="owner/name", help="repository; made if it is not there")
    add_repository_options(parser)
    parser.add_argument("--with-code", action="store_true", help="for people who have only transformers (trust_remote_code=True)")
    parser.add_argument(
        "--card-pictures",
        action="store_true",
        help="show the run's sheet of validation images in the card; think of who took them (default: generated pictures)",
    )
    options = parser.parse_args(argv)
    info = push_model(
        options.source,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        with_code=options.with_code,
        license=options.license,
        card_pictures=options.card_pictures,
        message=options.message or "Upload model",
    )
    print(f"pushed: {info.commit_url}")
    return 0


def add_repository_options(parser: argparse.ArgumentParser, *, with_license: bool = True) -> None:
    """What all pushes can be told. The access token comes from `hf auth login` or HF_TOKEN, never from the command line, where
    every user of the machine could read it."""
    parser.add_argument("--private", action="store_true", help="only you see it; a public repository is refused")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if it is not there (default: main)")
    if with_license:
        parser.add_argument("--license", help="apache-2.0, cc-by-4.0, cc-by-nc-4.0, other, ... (default: unknown)")
    parser.add_argument("--message", help="of the commit")
