"""What each of two ranks does for test_two_ranks.py, on one GPU: LOCAL_RANK is 0 for both, and gloo joins them, as NCCL wants a
GPU for each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState

from factories import make_arguments
from sim_hf.training.trainer import Trainer


def main(folder: Path) -> None:
    state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo")
    trainer = Trainer(two_ranks_arguments(folder, folder / "two", batch_size=2))
    trainer.train()
    torch.save(trainer.student.state_dict(), folder / f"rank{state.process_index}.pt")


def two_ranks_arguments(folder: Path, output_dir: Path, *, batch_size: int):
    """Plain descent: Adam would blow up what rounding does to gradients that are nearly zero."""
    options = {"supervision": "sim", "max_steps": 3, "optimizer": "sgd", "learning_rate": 1e-3}
    return make_arguments(folder, folder / "model", output_dir, batch_size=batch_size, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
