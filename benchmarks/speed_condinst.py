"""CondInst's inference beside torchvision's Mask R-CNN on the same ResNet-50 and Mask2Former here: one process, in turns.

    python benchmarks/speed_condinst.py --size 480 640 --repeats 3

Untrained networks with all weights drawn at random, so what they find means nothing: each is made to find as many instances
(`--instances`). Processor time, from a normalised picture to masks at its size; the median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

from sim_hf import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.models.condinst import CondInstConfig, CondInstForInstanceSegmentation

NUM_CLASSES = 80


def ours(model: torch.nn.Module, image: torch.Tensor, instances: int) -> Callable[[], int]:
    size = (image.shape[1], image.shape[2])
    processor = SIMImageProcessor()

    @torch.inference_mode()
    def run() -> int:
        outputs = model(image[None])
        found = processor.post_process_crops(outputs, [size], [size], threshold=0.0, max_instances=instances)
        return len(found[0]["scores"])

    return run


def mask_rcnn(image: torch.Tensor, instances: int) -> Callable[[], int]:
    """min_size and max_size: the picture stays as large as it is."""
    sides = image.shape[1:]
    options: dict[str, Any] = {"min_size": min(sides), "max_size": max(sides), "box_score_thresh": 0.0}
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1, box_detections_per_img=instances, **options
    ).eval()

    @torch.inference_mode()
    def run() -> int:
        return len((model([image])[0]["masks"] > 0.5).flatten(1))

    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"))
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    image = torch.rand(3, *(-(-side // 32) * 32 for side in options.size))
    labels = {label: f"class {label}" for label in range(NUM_CLASSES)}
    config = CondInstConfig.from_preset(
        "condinst-r50-1x", id2label=labels, score_threshold=0.0, nms_threshold=1.0, max_detections=options.instances
    )
    runs = {
        "torchvision Mask R-CNN, ResNet-50 FPN": mask_rcnn(image, options.instances),
        "CondInst, condinst-r50-1x": ours(CondInstForInstanceSegmentation(config).eval(), image, options.instances),
        "Mask2Former, r50": ours(
            SIMForInstanceSegmentation(SIMConfig.from_preset("r50", id2label=labels)).eval(), image, options.instances
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found = {name: run() for name, run in runs.items()}  # also the warm-up
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    reference = statistics.median(next(iter(seconds.values())))
    print(f"{image.shape[1]} x {image.shape[2]}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:40} {median:6.2f} s  x{median / reference:.2f}  ({found[name]} instances)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
