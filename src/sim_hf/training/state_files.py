"""Training state on disk without pickle: tensors and arrays in a safetensors file, the structure around them in JSON."""

from __future__ import annotations

import base64
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# Stored as they are; safetensors has a type for each.
_PLAIN_DTYPES = frozenset(
    {torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
# Stored as bytes with the name of the type.
_OTHER_DTYPES = {
    "complex32": torch.complex32,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or trusted."""


def save_state(path: str | Path, tree: Any) -> None:
    """Write a nest of dicts, lists and tuples as `<path>.safetensors` (tensors, numpy arrays) and `<path>.json` (the rest).

    Leaves: tensors of any dense dtype, numpy arrays and scalars, bool, int, float, str, bytes, None. Dict keys may be any
    leaf or tuple that is not an array. `load_state` gives back the same types and bits, tensors on the CPU; tensors that
    shared memory come back separate.
    """
    arrays: dict[str, torch.Tensor] = {}
    document = json.dumps({"format": 1, "tree": _encode(tree, "state", arrays)}, allow_nan=False)
    save_file(_without_shared_memory(arrays), _with_ending(path, ".safetensors"))
    _with_ending(path, ".json").write_text(document, encoding="utf-8")


def load_state(path: str | Path) -> Any:
    """What `save_state` wrote. Reads no pickle, whatever lies beside the two files."""
    json_file, tensor_file = _with_ending(path, ".json"), _with_ending(path, ".safetensors")
    for file in (json_file, tensor_file):
        if not file.is_file():
            raise CheckpointError(f"state file {file.name} is missing in {file.parent.name}")
    try:
        document = json.loads(json_file.read_text(encoding="utf-8"))
        tree = document["tree"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"state file {json_file.name} is damaged: {error}") from error
    try:
        arrays = load_file(tensor_file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"state file {tensor_file.name} is damaged: {error}") from error
    try:
        return _decode(tree, arrays)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{json_file.name} and {tensor_file.name} do not belong together: {error!r}") from error


def _with_ending(path: str | Path, ending: str) -> Path:
    return Path(path).with_name(Path(path).name + ending)


def _encode(node: Any, name: str, arrays: dict[str, torch.Tensor]) -> Any:
    """JSON for `node`: lists, strings, None, bool, int and finite floats as themselves, the rest as {kind: content}."""
    kind = type(node)
    if node is None or kind in (bool, int, str) or (kind is float and math.isfinite(node)):
        return node
    if kind is float:
        return {"float": repr(node)}
    if kind is bytes:
        return {"bytes": base64.b64encode(node).decode("ascii")}
    if kind in (list, tuple):
        items = [_encode(item, f"{name}[{position}]", arrays) for position, item in enumerate(node)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        tag = "dict" if kind is dict else "ordered_dict"
        pairs = [(_encode(key, f"key of {name}", arrays), _encode(node[key], f"{name}[{key!a}]", arrays)) for key in node]
        return {tag: pairs}
    if isinstance(node, torch.Tensor):
        return _encode_tensor(node, name, arrays)
    if isinstance(node, (np.ndarray, np.generic)):
        return _encode_array(node, name, arrays)
    raise CheckpointError(f"{name} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold")


def _encode_tensor(tensor: torch.Tensor, name: str, arrays: dict[str, torch.Tensor]) -> dict[str, Any]:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(f"{name} is a {tensor.layout} tensor on {tensor.device}; only dense ones can be saved")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    key = f"{len(arrays)}:{name}"
    if tensor.dtype in _PLAIN_DTYPES:
        arrays[key] = tensor
        return {"tensor": key}
    arrays[key] = tensor.reshape(-1).view(torch.uint8)
    return {"tensor": key, "dtype": _dtype_name(tensor, name), "shape": list(tensor.shape)}


def _dtype_name(tensor: torch.Tensor, name: str) -> str:
    for dtype_name, dtype in _OTHER_DTYPES.items():
        if tensor.dtype is dtype:
            return dtype_name
    raise CheckpointError(f"{name} is a tensor of {tensor.dtype}, which a checkpoint cannot hold")


def _encode_array(array: np.ndarray | np.generic, name: str, arrays: dict[str, torch.Tensor]) -> dict[str, Any]:
    if array.dtype.hasobject or array.dtype.names is not None:
        raise CheckpointError(f"{name} is a numpy array of {array.dtype}, which a checkpoint cannot hold")
    key = f"{len(arrays)}:{name}"
    arrays[key] = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else torch.zeros(0)
    kind = "array" if isinstance(array, np.ndarray) else "numpy_scalar"
    return {kind: key, "dtype": array.dtype.str, "shape": list(array.shape)}


def _decode(node: Any, arrays: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if "float" in node:
        return float(node["float"])
    if "bytes" in node:
        return base64.b64decode(node["bytes"], validate=True)
    if "tuple" in node:
        return tuple(_decode(item, arrays) for item in node["tuple"])
    if "dict" in node or "ordered_dict" in node:
        kind = dict if "dict" in node else OrderedDict
        pairs = node["dict"] if "dict" in node else node["ordered_dict"]
        return kind((_decode(key, arrays), _decode(value, arrays)) for key, value in pairs)
    if "tensor" in node:
        tensor = arrays[node["tensor"]].clone()  # load_file maps the file; a copy outlives it
        if "dtype" not in node:
            return tensor
        dtype = _OTHER_DTYPES[node["dtype"]]
        return tensor.view(dtype).reshape(node["shape"]) if tensor.numel() else torch.empty(node["shape"], dtype=dtype)
    key = node["array"] if "array" in node else node["numpy_scalar"]
    array = np.frombuffer(arrays[key].numpy().tobytes(), dtype=np.dtype(node["dtype"])).reshape(node["shape"])
    return array.copy() if "array" in node else array[()]


def _without_shared_memory(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors on one storage (views, tied weights): the second and later ones are copied."""
    seen: set[int] = set()
    separate = {}
    for key, tensor in arrays.items():
        pointer = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return separate
