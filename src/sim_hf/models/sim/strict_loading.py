"""A checkpoint is loaded completely or not at all: half-loaded weights predict something, and nobody notices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from safetensors import SafetensorError
from torch import nn

_SHOWN = 8
_CLASS_HEAD = "class_predictor."


class LoadsCompletely:
    """In front of a PreTrainedModel: its `from_pretrained` takes complete checkpoints only."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *model_args: Any,
        reinitialize: Sequence[str] = (),
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `from_pretrained`, strictly: missing, left over, misshapen or non-finite tensors are a ValueError that
        lists their names, and a file that is cut off is a ValueError, too.

        A folder or a Hub id (with `revision`, `dtype`, `device_map`, ...) of a checkpoint; SIM also takes stock Mask2Former ones.
        ignore_mismatched_sizes: the class head starts fresh where it does not fit (`num_labels=7`) or is not there.
        reinitialize: parts of names; tensors with one of them may be missing, left over or misshapen, too. Pickled weights are
        not read unless `use_safetensors` says so.
        """
        kwargs.setdefault("use_safetensors", True)
        if ignore_mismatched_sizes:
            reinitialize = (*reinitialize, _CLASS_HEAD)
        try:
            loaded: Any = super().from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]  # of the model behind it
                pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: the weights are damaged ({error})") from error
        model, info = loaded
        require_complete(str(pretrained_model_name_or_path), model, info, reinitialize=reinitialize)
        return (model, info) if output_loading_info else model


def require_complete(source: str, model: nn.Module, info: Mapping[str, Any], *, reinitialize: Iterable[str] = ()) -> None:
    """Raise a ValueError that lists the keys, if tensors are missing, left over, misshapen or not finite.

    info: what `from_pretrained(..., output_loading_info=True)` says. reinitialize: parts of names; tensors with one of them may
    be missing, left over or misshapen, they start fresh.
    """

    def starts_fresh(name: str) -> bool:
        # Older checkpoints of BatchNorm do not count their batches; nothing here reads the number.
        return name.endswith("num_batches_tracked") or any(part in name for part in reinitialize)

    problems = {
        "missing": sorted(name for name in info["missing_keys"] if not starts_fresh(name)),
        "unexpected": sorted(name for name in info["unexpected_keys"] if not any(part in name for part in reinitialize)),
        "misshapen": sorted(
            f"{name} {tuple(came)} instead of {tuple(wanted)}"
            for name, came, wanted in info["mismatched_keys"]
            if not starts_fresh(name)
        ),
        "not finite": [name for name, tensor in model.state_dict().items() if not _is_finite(tensor)],
    }
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{source} is not a complete checkpoint of {type(model).__name__}; {'; '.join(found)}")


def _is_finite(tensor: Any) -> bool:
    """Weights that a device map left on the disk are not read for this."""
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more + f" ({len(names)})"
