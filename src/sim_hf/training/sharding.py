"""FSDP: a network of which every process holds a part (`accelerate launch --use_fsdp --fsdp_version 2`).

Accelerate and torch's `fully_shard` do the sharding. Who looks at the network as a whole (teacher, checkpoint, export)
asks here for whole tensors; tensors that are not sharded pass through as they are. Gathering is a collective: all ranks
call it, in the same order.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments


def fsdp_is_asked_for() -> bool:
    """As `accelerate launch --use_fsdp` says it to the processes that it starts."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch` asked for, None without FSDP. What this package does not support is refused."""
    if not fsdp_is_asked_for():
        return None
    # Every process loads all weights: each makes its teacher of them, and Accelerate cannot distribute buffers (BatchNorm).
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP needs --fsdp_version 2 (torch's fully_shard), got version {plugin.fsdp_version}")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("FSDP with --fsdp_offload_params is not supported: gathering needs the weights on the GPU")
    if plugin.activation_checkpointing:
        raise ValueError(
            "use `--activation_checkpointing true` of the training command in place of --fsdp_activation_checkpointing"
        )
    # Autocast decides about precision as it does without FSDP, so that sharding does not change the numbers.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(output_dtype=torch.float32)
    # Outputs are views (of the queries without prompts); torch warns at every step, but nobody changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return plugin


def refuse_fsdp(arguments: TrainingArguments) -> None:
    """For drivers whose checkpoints hold the network as the process has it."""
    if arguments.fsdp or fsdp_is_asked_for():
        raise ValueError("transformers.Trainer with FSDP is not supported here: use DDP, or FSDP with `sim-hf train`")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """A nest of dicts with whole tensors, on the CPU, in place of sharded ones. keep=False: this rank only takes part."""
    if isinstance(tree, dict):
        return {name: gathered(value, keep=keep) for name, value in tree.items()}
    if not isinstance(tree, DTensor):
        return tree
    tensor = whole(tree)
    return tensor.cpu() if keep else None


def sharded_like(tensor: Tensor, own: Tensor) -> Tensor:
    """The inverse of `whole`: this rank's part of `tensor`, which every rank has, in the layout of `own`."""
    if not isinstance(own, DTensor) or tensor.shape != own.shape:  # a wrong shape is for `load_state_dict` to name
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def load_network(network: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict`, strictly, of whole tensors."""
    own = network.state_dict()
    network.load_state_dict({name: sharded_like(value, own.get(name, value)) for name, value in state.items()}, strict=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`load_state_dict` of whole tensors: the moments are sharded as their parameters, counters are not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: sharded_like(v, parameters[index]) if isinstance(v, Tensor) else v for name, v in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def whole_network(network: nn.Module, *, like: nn.Module) -> nn.Module:
    """`network` itself, or, when it is sharded, a whole copy of it. like: a whole network of the same layers."""
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return network
    copied = copy.deepcopy(like)
    copied.load_state_dict(gathered(dict(network.state_dict())), strict=True)
    return copied
