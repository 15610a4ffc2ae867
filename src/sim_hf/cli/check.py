"""`sim-hf check`: is this annotation file usable, and what is wrong with it?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sim_hf.data.box_format import BOX_FORMATS
from sim_hf.data.validation import validate_coco

_DESCRIPTION = """Find, count and name every fault of a COCO annotation file, and of its images when their folder is given.
Exit code: 0 usable (warnings are repaired on loading), 1 errors, 2 not readable as COCO."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code."""
    return run(_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Print the report -> exit code."""
    if args.decode and args.images is None:
        print("--decode needs --images DIR", file=sys.stderr)
        return 2
    try:
        report = validate_coco(
            args.annotations,
            args.images,
            images="decode" if args.decode else "header",
            box_format=args.box_format,
            strict=args.strict,
            with_masks=args.masks,
            progress=args.decode and sys.stderr.isatty(),
        )
    except ValueError as error:  # the image folder does not exist
        print(error, file=sys.stderr)
        return 2
    print(report.to_json() if args.json else report)
    return report.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sim-hf check", description=_DESCRIPTION)
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="COCO file (JSON)")
    parser.add_argument("--images", metavar="DIR", help="folder of the images: look for each file and compare its size")
    parser.add_argument("--decode", action="store_true", help="also decode every image (finds truncated files; slow)")
    parser.add_argument("--masks", action="store_true", help="also check the segmentations, which box training never reads")
    parser.add_argument("--strict", action="store_true", help="what would be repaired counts as an error")
    parser.add_argument("--box-format", choices=BOX_FORMATS, default="xywh", help="how the file writes boxes (COCO: xywh)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
