"""The same network, images and steps under several supervisions: what boxes cost, on your data.

    python examples/compare_supervisions.py                                        # generated scenes: boxinst, sim, full
    python examples/compare_supervisions.py --data folder --supervisions sim full  # images/, instances_{train,val}.json

`full` reads the real masks of the training file and is the upper bound; the others read boxes only. A single seed says
little: differences below one or two points of AP may be chance. `benchmarks/quality.py` runs several seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from sim_hf.data import write_scenes
from sim_hf.evaluation.baselines import filled_box_metrics, mean_fills
from sim_hf.evaluation.evaluate import evaluate_model
from sim_hf.training.arguments import DataArguments, ModelArguments, RunArguments, SupervisionArguments
from sim_hf.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("supervision", "mask AP", "AP50", "its boxes filled in: AP", "box AP", "mean fill (real)", "minutes")


def main() -> None:
    options = parse_options()
    folder = options.data or write_scenes("runs/scenes", num_train=options.scenes, num_val=options.scenes // 4)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name in options.supervisions:
        print(f"\n--- {name}: {options.steps} steps")
        lines.append(row_of(name, folder, options))
    table = "\n".join(lines)
    print(f"\n{table}")
    (options.output / "table.md").write_text(f"{table}\n", encoding="utf-8")


def row_of(name: str, folder: Path, options: argparse.Namespace) -> str:
    """Train with one supervision and measure -> a line of the table. The seed fixes weights, order and augmentation."""
    arguments = (
        ModelArguments(model=options.model),
        DataArguments(data=[str(folder)], scale_min=0.7, scale_max=1.4),
        SupervisionArguments(supervision=name, pairwise_dilation=1, color_threshold=0.1),
        RunArguments(
            output_dir=str(options.output / name),
            max_steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=2.5e-4,
            seed=options.seed,
            mixed_precision="auto",
            eval_every=0,
            checkpoint_every=0,
            report_to=["none"],
        ),
    )
    trainer = Trainer(arguments)
    started = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - started) / 60
    metrics, evaluator = evaluate_model(trainer.exported, trainer.processor, trainer.data.val, trainer.data.ground_truth)
    filled = filled_box_metrics(evaluator) if metrics.get("segm/AP") is not None else {}
    fill, real = mean_fills(evaluator)
    measured = [metrics.get("segm/AP"), metrics.get("segm/AP50"), filled.get("segm/AP"), metrics.get("bbox/AP")]
    cells = [f"`{name}`", *(_number(value, 100, 1) for value in measured), f"{_number(fill)} ({_number(real)})", f"{minutes:.1f}"]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, factor: float = 1, digits: int = 2) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with images/ and the two COCO files (default: generated scenes)")
    parser.add_argument("--supervisions", nargs="+", default=["boxinst", "sim", "full"], help="see docs/criteria.md")
    parser.add_argument("--model", default=str(ROOT / "assets" / "sim-tiny"), help="checkpoint that every run starts from")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=200, help="number of generated training scenes")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="a new folder: nothing is overwritten")
    return parser.parse_args()


if __name__ == "__main__":
    main()
