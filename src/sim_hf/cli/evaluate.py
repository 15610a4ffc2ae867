"""`sim-hf evaluate`: the 12 COCO mask numbers and the 12 box numbers of a model, at original resolution.

Shards over processes (`accelerate launch -m sim_hf evaluate ...`) with the same result as one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sim_hf.data import load_coco
from sim_hf.evaluation import format_table, write_results
from sim_hf.evaluation.baselines import filled_box_metrics, mean_fills
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.models.architectures import load_model
from sim_hf.models.sim import SIMImageProcessor
from sim_hf.processes import process_state


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf evaluate", description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("--annotations", required=True, type=Path, help="COCO file; mask AP needs masks in it")
    parser.add_argument("--images", required=True, type=Path, help="folder of its images")
    parser.add_argument("--output", type=Path, help="folder for results.json and detections.json")
    parser.add_argument("--per-class", action="store_true", help="AP of every class too")
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward pass")
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--box-format", choices=("xywh", "xyxy"), default="xywh", help="what bbox holds in the file")
    options = parser.parse_args(argv)
    state = process_state()
    rows = load_coco(options.images, options.annotations, box_format=options.box_format)
    model = load_model(options.model, dtype=torch.float32)
    model.to(state.device)
    metrics, evaluator = evaluate_model(
        model,
        SIMImageProcessor.from_pretrained(options.model),
        rows,
        options.annotations,
        batch_size=options.batch_size,
        process_index=state.process_index,
        num_processes=state.num_processes,
        limit=options.limit,
        per_class=options.per_class,
    )
    if not state.is_main_process:
        return 0
    print(format_table(metrics))
    if evaluator.note:
        print(evaluator.note)
    predicted, real = mean_fills(evaluator)
    if predicted is not None:
        of_real = "" if real is None else f"; of the real masks: {real:.2f}"
        print(f"mean fill of the masks (mask area / area of its own box): {predicted:.2f}{of_real}")
    filled = filled_box_metrics(evaluator) if metrics.get("segm/AP") is not None else {}
    if filled:
        print(f"the same detections with their boxes filled in: mask AP {filled['segm/AP']:.3f}, AP50 {filled['segm/AP50']:.3f}")
    if options.output:
        extra = {
            "model": str(options.model),
            "annotations": str(options.annotations),
            "note": evaluator.note,
            "mean_fill": {"predicted": predicted, "real": real},
            "filled_boxes": filled,
        }
        write_results(options.output / "results.json", metrics, extra=extra)
        (options.output / "detections.json").write_text(json.dumps(evaluator.coco_results()), encoding="utf-8")
        print(f"written: {options.output}/results.json and detections.json")
    return 0
