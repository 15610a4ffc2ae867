"""What is asked of FSDP, and what is refused; the training itself: test_two_processes.py."""

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from sim_hf.training.sharding import fsdp_plugin, gathered, load_optimizer, whole, whole_network


@pytest.fixture
def launched(monkeypatch):
    """As `accelerate launch --use_fsdp --fsdp_version 2` leaves the environment."""
    defaults = {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    for name, value in {"ACCELERATE_USE_FSDP": "true", **defaults}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_without_fsdp_nothing_is_sharded_or_copied(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert fsdp_plugin() is None
    network = torch.nn.Linear(2, 2)
    assert whole_network(network, like=torch.nn.Linear(2, 2)) is network
    assert whole(network.weight) is network.weight
    assert gathered({"a": {"b": network.weight}, "c": [1]}, keep=False)["a"]["b"] is network.weight


def test_every_process_loads_all_weights_and_autocast_keeps_the_precision(launched):
    plugin = fsdp_plugin()
    assert plugin is not None
    assert not plugin.cpu_ram_efficient_loading
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(output_dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "--fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--activation_checkpointing true"),
    ],
)
def test_what_is_not_supported_is_refused(launched, name, value, message):
    launched.setenv(name, value)
    if name == "FSDP_VERSION":
        launched.delenv("FSDP_RESHARD_AFTER_FORWARD")
    with pytest.raises(ValueError, match=message):
        fsdp_plugin()


def test_optimizer_state_of_plain_parameters_comes_back():
    optimizers = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizers.append(torch.optim.AdamW(layer.parameters()))
    layer(torch.ones(1, 3)).sum().backward()
    optimizers[1].step()
    load_optimizer(optimizers[0], optimizers[1].state_dict())
    for index, values in optimizers[1].state_dict()["state"].items():
        assert all(torch.equal(optimizers[0].state_dict()["state"][index][name], value) for name, value in values.items())
