"""What two sharded ranks do for test_two_processes.py, beside DDP: `torchrun --nproc_per_node 2 worker_fsdp.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from factories import make_arguments
from sim_hf.training import trainer as training
from sim_hf.training.trainer import Trainer

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
OPTIONS = {"supervision": "sim", "max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "eval_limit": 3}


class CPUAccelerator(Accelerator):
    """Accelerate starts FSDP only on accelerators. This one starts it for CPU processes; all that follows is Accelerate's."""

    def __init__(self, *, fsdp_plugin, **options) -> None:
        super().__init__(fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = fsdp_plugin


def run(folder: Path, model: str, output_dir: str, *, sharded: bool = True, layers: str = "", **options) -> dict:
    """Train -> the training state (whole, on the first rank), this rank's teacher, losses. layers: those that are sharded one
    by one; empty means those of the network's own list."""
    for name in (*FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP"):
        os.environ.pop(name, None)
    os.environ |= FSDP if sharded else {}
    os.environ |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": layers} if sharded and layers else {}
    AcceleratorState._reset_state()  # the process group stays
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_CPU

    trainer = Trainer(make_arguments(folder, folder / model, folder / output_dir, **{**OPTIONS, **options}))
    assert {isinstance(parameter, DTensor) for parameter in trainer.student.parameters()} == {sharded}
    metrics = trainer.train()
    assert trainer.step.teacher is not None
    lines = (folder / output_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "state": trainer.resumer._state(),
        "teacher": trainer.step.teacher.state_dict(),
        "metrics": metrics,
        "history": [json.loads(line) for line in lines],
    }


def main(folder: Path) -> None:
    training.Accelerator = CPUAccelerator
    results = {"ddp": run(folder, "moving", "fsdp_ddp", sharded=False), "sharded": run(folder, "moving", "fsdp_sharded")}
    run(folder, "moving", "fsdp_parts", stop_after=2)
    results["parts"] = run(folder, "moving", "fsdp_parts", resume="auto")
    swin = {"activation_checkpointing": True, "export": "student", "max_steps": 2}
    results["swin_ddp"] = run(folder, "swin", "fsdp_swin_ddp", sharded=False, **swin)
    layers = "SwinLayer,Mask2FormerMaskedAttentionDecoderLayer"
    results["swin"] = run(folder, "swin", "fsdp_swin", layers=layers, **swin)
    results["bf16_ddp"] = run(folder, "moving", "fsdp_bf16_ddp", sharded=False, mixed_precision="bf16", max_steps=2)
    results["bf16"] = run(folder, "moving", "fsdp_bf16", mixed_precision="bf16", max_steps=2)
    torch.save(results, folder / f"fsdp{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
