"""`sim-hf push-dataset`: COCO files and their pictures as a data set on the Hugging Face Hub, with boxes, or with masks.

The pictures are uploaded: do this with pictures that you may share.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sim_hf.cli.push import add_repository_options
from sim_hf.hub.dataset import coco_dataset, push_dataset

SPLITS = ("train", "validation", "test")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf push-dataset", description=__doc__)
    parser.add_argument("repo_id", metavar="owner/name", help="repository; made if it is not there")
    parser.add_argument("--images", required=True, type=Path, help="folder of the pictures")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=Path, metavar="FILE", help=f"COCO file of the split {split!r}")
    parser.add_argument("--masks", action="store_true", help="the masks too, such as `sim-hf label` makes (default: boxes only)")
    parser.add_argument("--box-format", choices=("xywh", "xyxy"), default="xywh", help="what bbox holds in the files")
    add_repository_options(parser)
    options = parser.parse_args(argv)
    files = {split: getattr(options, split) for split in SPLITS if getattr(options, split)}
    if not files:
        parser.error("give at least one COCO file: --train, --validation or --test")
    splits = {
        split: coco_dataset(options.images, file, with_masks=options.masks, box_format=options.box_format)
        for split, file in files.items()
    }
    info = push_dataset(
        splits,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        license=options.license or "unknown",
        message=options.message or "Upload data set",
    )
    print(f"pushed: {info.commit_url}")
    return 0
