"""The boxes of a COCO file become masks, and you look at them.

    python examples/label_your_coco_boxes.py                                                    # on generated scenes
    python examples/label_your_coco_boxes.py --annotations boxes.json --images images           # on your own data
    python examples/label_your_coco_boxes.py --scenes 40 --seed 34 --show 5 3 12 25 --picture docs/images/boxes-to-masks.jpg

The last line made the picture of the README. A model that was trained on the boxes you label makes better masks than the
shipped one: train first (examples/finetune_on_your_data.py), then give the run's model/ folder as --model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from sim_hf import draw_instances, load_coco
from sim_hf.data import decode_segmentation, write_scenes
from sim_hf.label_file import LabelJob, label_file
from sim_hf.visualization import contact_sheet

ROOT = Path(__file__).resolve().parents[1]
CELL = 320  # longer side of a picture on the sheet


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)

    # 1. Boxes: yours, or those of generated scenes (which come with real masks, so the result can be measured).
    annotations, images = options.annotations, options.images
    if annotations is None:
        scenes = write_scenes(options.output / "scenes", num_train=0, num_val=options.scenes, seed=options.seed, size=384)
        annotations, images = scenes / "instances_val.json", scenes / "images"

    # 2. One mask for every box. The input file is not changed; an interrupted call goes on where it stopped.
    labelled = options.output / "masks.json"
    label_file(LabelJob(options.model, annotations, images, labelled))

    # 3. Read them back as rows of a `datasets.Dataset`, and draw what was given beside what came out.
    rows = load_coco(images, labelled, with_masks=True)
    shown = options.show or range(min(8, len(rows)))
    cells = [picture for index in shown for picture in draw_boxes_and_masks(rows, index)]
    sheet = contact_sheet([cells[i : i + 4] for i in range(0, len(cells), 4)], ["boxes", "masks"] * 2, cell_size=CELL)
    picture = options.picture or options.output / "masks.jpg"
    sheet.save(picture, quality=85, optimize=True)
    print(f"look at {picture}")


def draw_boxes_and_masks(rows, index: int) -> tuple[Image.Image, Image.Image]:
    """The picture of a row with its boxes, and the same with the masks."""
    row = rows[index]
    objects = row["objects"]
    boxes_n4 = torch.tensor(objects["bbox"]).reshape(-1, 4)
    boxes_n4[:, 2:] += boxes_n4[:, :2]  # COCO's x, y, width, height -> corners
    masks = [torch.from_numpy(decode_segmentation(text, row["height"], row["width"])) for text in objects["segmentation"]]
    shown = {"boxes": boxes_n4, "labels": objects["category"], "masks": masks}
    names = dict(enumerate(rows.features["objects"]["category"].feature.names))
    picture = row["image"].convert("RGB")
    given = draw_instances(picture, shown, names, side=CELL, with_masks=False)
    return given, draw_instances(picture, shown, names, side=CELL, with_boxes=False, with_labels=False)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, help="COCO file with boxes (default: generated scenes)")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--model", default=str(ROOT / "assets" / "sim-tiny"), help="folder or Hub id of a trained model")
    parser.add_argument("--output", type=Path, default=Path("runs/label"), help="folder for masks.json and masks.jpg")
    parser.add_argument("--picture", type=Path, help="where the picture goes (default: OUTPUT/masks.jpg)")
    parser.add_argument("--show", type=int, nargs="+", metavar="INDEX", help="images on the picture (default: the first 8)")
    parser.add_argument("--scenes", type=int, default=8, help="number of generated scenes")
    parser.add_argument("--seed", type=int, default=1, help="of the generated scenes")
    options = parser.parse_args()
    if (options.annotations is None) != (options.images is None):
        parser.error("--annotations and --images go together")
    return options


if __name__ == "__main__":
    main()
