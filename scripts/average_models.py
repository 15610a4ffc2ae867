"""One model from several that began with the same weights: the mean of their weights ("model soup", arXiv 2203.05482).

    python scripts/average_models.py runs/a/model runs/b/model --output runs/mean

The models have the same architecture and classes; input size and the rest are those of the first one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sim_hf.models.architectures import load_model
from sim_hf.models.sim import SIMImageProcessor
from sim_hf.training.periodic import save_model_folder


@torch.no_grad()
def average(folders: list[Path]) -> torch.nn.Module:
    """The first model with the mean of all weights, float32; tensors of integers are the first one's. Other names or shapes of
    weights, or other classes, are a ValueError."""
    first, *others = (load_model(str(folder), dtype=torch.float32) for folder in folders)
    mean = first.state_dict()
    for folder, other in zip(folders[1:], others, strict=True):
        weights = other.state_dict()
        if other.config.id2label != first.config.id2label:
            raise ValueError(f"{folder} has other classes than {folders[0]}")
        if {name: x.shape for name, x in weights.items()} != {name: x.shape for name, x in mean.items()}:
            raise ValueError(f"{folder} has other weights than {folders[0]}")
        for name, tensor in mean.items():
            if tensor.is_floating_point():
                tensor += weights[name]
    for tensor in mean.values():
        if tensor.is_floating_point():
            tensor /= len(folders)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="model folders")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    save_model_folder(average(options.models), SIMImageProcessor.from_pretrained(str(options.models[0])), options.output)
    print(f"the mean of {len(options.models)} models: {options.output}")


if __name__ == "__main__":
    main()
