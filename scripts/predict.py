"""Instances of pictures: overlays and a COCO results file.

    accelerate launch scripts/predict.py MODEL photo.jpg folder-of-photos --output runs/predictions

Two processes on CPUs: torchrun --nproc_per_node 2 scripts/predict.py ...   (every option: --help)
"""

import sys

from sim_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
