"""`sim-hf label`: one mask for every box of a COCO file; everything else of the file stays as it was."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sim_hf.label_file import LabelJob, label_file


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf label", description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("--annotations", required=True, type=Path, help="COCO file with boxes")
    parser.add_argument("--images", required=True, type=Path, help="folder of its images")
    parser.add_argument("--output", required=True, type=Path, help="COCO file to write")
    parser.add_argument("--polygons", action="store_true", help="write polygons (holes are lost) instead of RLE")
    parser.add_argument("--keep-masks", action="store_true", help="leave annotations alone that already have a segmentation")
    parser.add_argument(
        "--restart", action="store_true", help="forget what an interrupted call has done (default: go on with it)"
    )
    parser.add_argument(
        "--crop-below",
        type=float,
        default=LabelJob.crop_below,
        metavar="SHARE",
        help="enlarge boxes whose longer side is below this share of the picture's (0: never, 1: always; default: %(default)s)",
    )
    parser.add_argument(
        "--crop-margins",
        type=float,
        nargs="+",
        default=LabelJob.crop_margins,
        metavar="MARGIN",
        help="what an enlarged view shows around its largest box, as a share of its longer side; a set of views for each "
        "number. `--crop-margins 3` is several times faster for many small boxes, and less exact in photographs (default: "
        + " ".join(map(str, LabelJob.crop_margins))
        + ")",
    )
    parser.add_argument("--box-format", choices=("xywh", "xyxy"), default="xywh", help="what bbox holds in the file")
    parser.add_argument("--batch-size", type=int, default=8, help="images and crops per forward pass")
    parser.add_argument("--pictures", type=Path, help="folder for overlays of the first images")
    options = parser.parse_args(argv)
    job = LabelJob(
        model=options.model,
        annotations=options.annotations,
        images=options.images,
        output=options.output,
        polygons=options.polygons,
        keep_masks=options.keep_masks,
        restart=options.restart,
        crop_below=options.crop_below,
        crop_margins=tuple(options.crop_margins),
        box_format=options.box_format,
        batch_size=options.batch_size,
        pictures=options.pictures,
    )
    label_file(job)
    return 0
