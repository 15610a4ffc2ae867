"""What the Hub would refuse in a card, and what a reader would miss, found without a network."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_REQUIRED = ("license", "library_name", "pipeline_tag", "tags")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class CardError(ValueError):
    """A card that must not be pushed; the message lists what is wrong."""


def check_model_card(text: str) -> None:
    """CardError with every fault of a model card's metadata."""
    problems = card_problems(text)
    if problems:
        raise CardError("the model card (README.md) is not right: " + "; ".join(problems))


def card_problems(text: str) -> list[str]:
    """Faults of the metadata, a line each: license, library_name, pipeline_tag, tags, datasets, metrics and model-index."""
    match = _FRONT_MATTER.match(text)
    if match is None:
        return ["it begins without metadata (--- lines of YAML ---)"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"its metadata is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ["its metadata is no mapping"]
    problems = [f"{key} is missing" for key in _REQUIRED if not data.get(key)]
    for key in ("license", "library_name", "pipeline_tag"):
        if key in data and not (isinstance(data[key], str) and _IDENTIFIER.fullmatch(data[key])):
            problems.append(f"{key} must be an identifier such as 'apache-2.0', got {data[key]!r}")
    for key in ("tags", "metrics"):
        if not _is_list_of(data.get(key, []), re.compile(r"\S.*")):
            problems.append(f"{key} must be a list of words, got {data[key]!r}")
    if not _is_list_of(data.get("datasets", []), _HUB_ID):
        problems.append(f"datasets must be a list of Hub ids, got {data['datasets']!r}")
    return problems + _index_problems(data.get("model-index", []))


def _is_list_of(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and pattern.fullmatch(item) for item in value)


def _index_problems(index: Any) -> list[str]:
    if not isinstance(index, list) or not all(isinstance(model, dict) and model.get("name") for model in index):
        return ["model-index must be a list of {name, results}"]
    problems = []
    for model in index:
        for number, result in enumerate(model.get("results") or []):
            place = f"model-index {model['name']}, result {number}"
            for key, fields in {"task": ("type",), "dataset": ("type", "name")}.items():
                if not isinstance(result.get(key), dict) or not all(result[key].get(name) for name in fields):
                    problems.append(f"{place}: {key} needs {' and '.join(fields)}")
            for metric in result.get("metrics") or [{}]:
                value = metric.get("value")
                if not metric.get("type"):
                    problems.append(f"{place}: a metric needs its type")
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    problems.append(f"{place}: the value of {metric.get('name', 'a metric')} is {value!r}, no number")
    return problems
