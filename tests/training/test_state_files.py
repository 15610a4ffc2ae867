"""State files give back the same bits and types, and nothing but what was saved."""

import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from sim_hf.training.state_files import CheckpointError, load_state, save_state


def same(left, right) -> bool:
    """Same types, same structure, same bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, (np.ndarray, np.generic)):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return len(left) == len(right) and all(same(a, c) and same(left[a], right[c]) for a, c in zip(left, right, strict=True))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)  # NaN and -0.0 included


def round_trip(folder: Path, tree):
    save_state(folder / "state", tree)
    return load_state(folder / "state")


@pytest.mark.parametrize(
    "leaf",
    [
        *(None, True, False, 0, -(2**80), 0.1, -0.0, float("nan"), float("-inf"), "", "ä\n\ud800", b"\x00\xff", [], (), {}),
        *(np.float64(0.1), np.int8(-3), np.bool_(True), np.zeros((0, 3)), np.array(2.5), np.array(["ab", "c"])),
        *(np.arange(6, dtype=">i4").reshape(2, 3)[:, ::-1], torch.tensor(3), torch.zeros(0, 4, dtype=torch.bool)),
    ],
    ids=repr,
)
def test_leaf_comes_back_with_type_and_bits(tmp_path, leaf):
    assert same(round_trip(tmp_path, {"leaf": leaf}), {"leaf": leaf})


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.uint32, torch.float16, torch.bfloat16, torch.float64),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_tensor_of_every_dtype_comes_back(tmp_path, dtype):
    tensors = [(torch.arange(12) % 5).reshape(3, 4).to(dtype), torch.empty(2, 0, dtype=dtype), torch.ones((), dtype=dtype)]
    assert same(round_trip(tmp_path, tensors), tensors)


def test_views_of_one_memory_and_transposed_tensors_come_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tree = [base, base[1], base.T, base[:, 1:], torch.nn.Parameter(base)]
    expected = [base, base[1], base.T, base[:, 1:], base]
    assert same(round_trip(tmp_path, tree), expected)


def test_dicts_keep_order_and_the_types_of_their_keys(tmp_path):
    tree = {"b": 1, 2: "int", "2": "str", None: 3, (1, "x"): [4], True: OrderedDict(z=1, a=(2, [3]))}
    assert same(round_trip(tmp_path, tree), tree)


def test_dict_that_looks_like_our_own_markers_comes_back(tmp_path):
    tree = {"tuple": [1, 2], "dict": {"tensor": "x"}, "array": {"float": "nan"}}
    assert same(round_trip(tmp_path, tree), tree)


def test_optimizer_state_comes_back_and_loads(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = round_trip(tmp_path, optimizer.state_dict())
    assert same(state, optimizer.state_dict())
    torch.optim.AdamW(model.parameters()).load_state_dict(state)


def test_random_states_go_on_where_they_stopped(tmp_path):
    generator = np.random.default_rng(3)
    state = round_trip(tmp_path, [random.getstate(), np.random.get_state(), torch.get_rng_state(), generator.bit_generator.state])
    expected = random.random(), np.random.rand(), torch.rand(1).item(), generator.random()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    generator.bit_generator.state = state[3]
    assert (random.random(), np.random.rand(), torch.rand(1).item(), generator.random()) == expected


@pytest.mark.parametrize(
    "leaf", [{1, 2}, object(), Path("x"), torch.Size([1]), np.array([object()]), torch.zeros(2).to_sparse(), torch.float32]
)
def test_what_cannot_be_saved_is_named(tmp_path, leaf):
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[1\]"):
        save_state(tmp_path / "state", {"a": [0, leaf]})


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    state = round_trip(tmp_path, torch.arange(4.0))
    (tmp_path / "state.safetensors").write_bytes(b"")
    assert state.tolist() == [0, 1, 2, 3]


class _Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["CANARY"],)


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
def test_pickle_in_place_of_a_state_file_is_refused_and_not_run(tmp_path, monkeypatch, ending):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    save_state(tmp_path / "state", {"weight": torch.ones(2)})
    for name in (f"state{ending}", "state.pt", "state.bin", "state.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match=f"state{ending} is damaged"):
        load_state(tmp_path / "state")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
def test_missing_state_file_is_named(tmp_path, ending):
    save_state(tmp_path / "state", {})
    (tmp_path / f"state{ending}").unlink()
    with pytest.raises(CheckpointError, match=f"state{ending} is missing"):
        load_state(tmp_path / "state")


def test_state_files_of_two_saves_do_not_mix(tmp_path):
    save_state(tmp_path / "a", {"x": torch.ones(2)})
    save_state(tmp_path / "b", {"y": torch.ones(2)})
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_state(tmp_path / "b")
