"""`sim-hf convert`: a COCO, YOLO, Pascal VOC or Hub data set as the COCO folder that the other commands read.

Class names keep their order, images without objects are kept, the source is never written to. Training gets boxes only: masks,
where the source has any, go into the validation file and nowhere else.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from sim_hf.conversion import (
    CocoSource,
    ConversionReport,
    DetectionSource,
    HubSource,
    VocSource,
    YoloSource,
    write_coco_folder,
)
from sim_hf.conversion.voc import DIFFICULT


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    output = options.output.resolve()
    source = Path(options.source).resolve()
    if options.format in ("yolo", "voc") or (options.format == "coco" and source.is_dir()):
        folder = source.parent if source.is_file() else source
        if output == folder or output.is_relative_to(folder) or folder.is_relative_to(output):
            raise ValueError(
                f"--output {options.output} and the source {options.source} lie in each other; choose another folder"
            )
    report = write_coco_folder(
        _source(options),
        output,
        copy=options.copy,
        overwrite=options.overwrite,
        val_fraction=options.val_fraction,
    )
    _print(report, options)
    return 0


def _source(options: argparse.Namespace) -> DetectionSource:
    if options.format == "coco":
        return CocoSource(
            Path(options.source),
            images=options.images,
            val=options.val,
            val_images=options.val_images,
            box_format=options.box_format,
        )
    if options.format == "yolo":
        return YoloSource(Path(options.source))
    if options.format == "voc":
        return VocSource(Path(options.source), train=options.train, val=options.val, difficult=options.difficult)
    return HubSource(
        options.source,
        train_split=options.train_split,
        val_split=None if options.val_split == "none" else options.val_split,
        config_name=options.config_name,
        revision=options.revision,
        box_format=options.box_format,
    )


def _print(report: ConversionReport, options: argparse.Namespace) -> None:
    for split, counts in report.splits.items():
        masks = f", {counts.num_masks} masks" if counts.num_masks else ""
        crowds = f", {counts.num_crowds} ignored regions" if counts.num_crowds else ""
        images = f"{counts.num_images} images ({counts.num_empty_images} without objects)"
        print(f"{split}: {images}, {counts.num_boxes} boxes{masks}{crowds} -> {options.output / f'instances_{split}.json'}")
    print(f"{len(report.class_names)} classes: {', '.join(report.class_names)}")
    print(f"images: {'hard links to the files of the source' if report.linked else 'copies'}")
    for text, count in sorted(report.notes.items()):
        print(f"note: {count} {text}")
    if "val" not in report.splits:
        print("note: there is no validation split; --val-fraction 0.1 draws one, to be measured on")
    print(f"checked; next: sim-hf train --data {shlex.quote(str(options.output))} --model MODEL --output_dir runs/mine")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sim-hf convert", description=__doc__)
    formats = parser.add_subparsers(dest="format", required=True, metavar="coco | yolo | voc | hub")
    coco = formats.add_parser("coco", help="COCO files as Roboflow, COCO 2017, CVAT or Label Studio lay them out, or one file")
    coco.add_argument("source", metavar="SOURCE", help="the folder of the data set, or the COCO file to train on")
    coco.add_argument("--images", type=Path, help="folder of the file's images (default: found near it)")
    coco.add_argument("--val", type=Path, metavar="FILE", help="COCO file to measure on, where SOURCE is a file")
    coco.add_argument("--val-images", type=Path, metavar="FOLDER", help="folder of its images (default: found near it)")
    yolo = formats.add_parser("yolo", help="data.yaml and text files; polygons become boxes")
    yolo.add_argument("source", metavar="SOURCE", help="the folder of the data set, or its data.yaml")
    voc = formats.add_parser("voc", help="XML files; VOC 2012 with its splits and the masks of its validation images")
    voc.add_argument("source", metavar="SOURCE", help="VOCdevkit/VOC2012, or folders of pictures and XML files")
    voc.add_argument("--train", metavar="LIST", help="list below ImageSets/ to train on, such as Main/train")
    voc.add_argument("--val", metavar="LIST", help="list below ImageSets/ to measure on, such as Segmentation/val")
    voc.add_argument("--difficult", choices=DIFFICULT, default="keep", help="what becomes of objects with this flag")
    hub = formats.add_parser("hub", help="a data set with image and objects {bbox, category}")
    hub.add_argument("source", metavar="owner/name", help="data set of the Hub, or a folder saved by `datasets`")
    hub.add_argument("--train-split", default="train", help="split to train on (default: %(default)s)")
    hub.add_argument("--val-split", default="validation", help="split to measure on, or none (default: %(default)s)")
    hub.add_argument("--config-name", help="configuration of the data set, if it has several")
    hub.add_argument("--revision", help="branch, tag or commit")
    for one in (coco, hub):
        one.add_argument("--box-format", choices=("xywh", "xyxy"), default="xywh", help="what bbox holds (default: %(default)s)")
    for one in (coco, yolo, voc, hub):
        one.add_argument("--output", required=True, type=Path, help="folder to make: images/, instances_train.json, ...val.json")
        one.add_argument("--copy", action="store_true", help="copy the images (default: hard links where that is possible)")
        one.add_argument("--overwrite", action="store_true", help="replace the result of an earlier conversion")
        one.add_argument(
            "--val-fraction",
            type=float,
            default=0.0,
            metavar="SHARE",
            help="share of the training images to measure on, if the source has no validation split",
        )
    return parser
