"""Train a model from boxes.

    accelerate launch scripts/train.py --config scripts/configs/tiny-sim.yaml --data FOLDER --output_dir runs/mine

Two processes on CPUs: torchrun --nproc_per_node 2 scripts/train.py ...   (every option: --help)
"""

import sys

from sim_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
