"""Measuring: COCO mask AP and box AP, and the files that keep the numbers."""

from sim_hf.evaluation.coco_evaluator import CocoEvaluator
from sim_hf.evaluation.coco_results import from_coco_results, to_coco_results
from sim_hf.evaluation.ground_truth import coco_ground_truth
from sim_hf.evaluation.results import format_table, write_results

__all__ = [
    "CocoEvaluator",
    "coco_ground_truth",
    "format_table",
    "from_coco_results",
    "to_coco_results",
    "write_results",
]
