"""Fine-tune a trained model on your boxes, with the Trainer that you know from transformers.

    python examples/finetune_on_your_data.py                              # on generated scenes, a few minutes on a CPU
    python examples/finetune_on_your_data.py --data folder --steps 1500   # images/, instances_train.json, instances_val.json
    python examples/finetune_on_your_data.py --data folder --push_to owner/name

Training reads boxes only. Masks in instances_val.json, if there are any, are what the result is measured with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import TrainingArguments

from sim_hf import SIMImageProcessor, load_coco
from sim_hf.data import category_ids, write_scenes
from sim_hf.models.sim import load_pretrained_for_classes
from sim_hf.training.arguments import DataArguments, SupervisionArguments
from sim_hf.training.hf_trainer import SIMTrainer

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = parse_options()

    # 1. Data: a COCO file becomes a `datasets.Dataset` in the Hub's detection convention.
    folder = options.data or write_scenes("runs/scenes", num_train=options.scenes, num_val=options.scenes // 4)
    rows = {split: load_coco(folder / "images", folder / f"instances_{split}.json") for split in ("train", "val")}
    names = rows["train"].features["objects"]["category"].feature.names

    # 2. Model: classes of the same name keep what they know, other heads start anew, everything else is loaded.
    model, report = load_pretrained_for_classes(
        options.model, id2label=dict(enumerate(names)), category_ids=category_ids(rows["train"])
    )
    processor = SIMImageProcessor.from_pretrained(options.model)
    print(report)

    # 3. Trainer: transformers' own arguments; the losses, the teacher and COCO AP come from SIMTrainer.
    trainer = SIMTrainer(
        model,
        TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=2.5e-4,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=0.02,  # a share of the run
            logging_steps=max(1, options.steps // 20),
            save_steps=max(1, options.steps // 4),
            save_total_limit=2,
            report_to="none",
            hub_model_id=options.push_to,
        ),
        supervision=SupervisionArguments(supervision=options.supervision, pairwise_dilation=1, color_threshold=0.1),
        augmentation=DataArguments(scale_min=0.7, scale_max=1.4),
        image_processor=processor,
        train_dataset=rows["train"],
        eval_dataset=rows["val"],
        eval_ground_truth=folder / "instances_val.json",
    )

    # 4. Measure, train, measure. What was interrupted goes on: trainer.train(resume_from_checkpoint=True).
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=options.resume)
    after = trainer.evaluate()
    for name in ("segm/AP", "segm/AP50", "bbox/AP"):
        print(f"{name:10} before {_percent(before.get(f'eval_{name}'))}  after {_percent(after.get(f'eval_{name}'))}")

    # 5. Keep it, and share it: the card is written from the run.
    trainer.save_model(str(options.output / "model"))
    print(f'SIMForInstanceSegmentation.from_pretrained("{options.output}/model") loads it')
    if options.push_to:
        print(trainer.push_to_hub())


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:5.1f}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with images/ and the two COCO files (default: generated scenes)")
    parser.add_argument("--model", default=str(ROOT / "assets" / "sim-tiny"), help="checkpoint to start from: folder or Hub id")
    parser.add_argument("--supervision", default="sim", help="sim, boxinst, level_set, bbtp or full (reads masks)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=200, help="number of generated training scenes")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--resume", action="store_true", default=None, help="go on from the newest checkpoint of --output")
    parser.add_argument("--push_to", metavar="owner/name", help="push the result to this repository of the Hub")
    return parser.parse_args()


if __name__ == "__main__":
    main()
