"""The fetched files as modules. What they import of the rest of transformers' repository is not in the sdist and stays empty."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import fetch
import pytest
import torch

PACKAGE = "transformers_tests"
REASON = (
    "transformers' own tests are not here: they come from the sdist of the installed version, which `make install` fetches where"
    " there is a network (python tests/conformance/fetch.py)"
)
_NOT_IN_THE_SDIST = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # The fields every configuration has, with values other than their defaults.
    f"{PACKAGE}.utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["SIMForInstanceSegmentation"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
        }
    },
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}


def load(name: str) -> ModuleType:
    """tests/{name}.py of transformers; skips the module that asks where it is not there."""
    if not fetch.is_there():
        pytest.skip(REASON, allow_module_level=True)
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(fetch.FOLDER)]
        sys.modules[PACKAGE] = package
        for path, attributes in _NOT_IN_THE_SDIST.items():
            parent = path.rpartition(".")[0]
            if parent not in ("", PACKAGE):
                sys.modules.setdefault(parent, ModuleType(parent))
            sys.modules[path] = ModuleType(path)
            vars(sys.modules[path]).update(attributes)
    return importlib.import_module(f"{PACKAGE}.{name}")


def floats(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))
