"""COCO mask and box AP of a model on a data set.

    accelerate launch scripts/evaluate.py MODEL --annotations instances_val.json --images images --output runs/evaluation

Two processes on CPUs: torchrun --nproc_per_node 2 scripts/evaluate.py ...   (every option: --help)
"""

import sys

from sim_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
