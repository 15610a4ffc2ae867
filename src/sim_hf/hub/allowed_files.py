"""What may go to the Hub: names on a list, and nothing that looks like a secret.

A run's folder also holds checkpoints, logs, pictures of other people's photographs and whatever else somebody put there. None
of that is pushed by accident, because a file is pushed for its name and not for its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

CARD = "README.md"
WEIGHTS = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors|model(\.[\w-]+)?\.safetensors\.index(\.[\w-]+)?\.json")
MODEL_FILES = re.compile(rf"config\.json|(pre)?processor_config\.json|custom_pipelines\.json|{WEIGHTS.pattern}")
CODE_FILES = re.compile(r"[a-z]\w*\.py")
PICTURES = re.compile(r"pictures/[\w-]+\.(jpg|png)")
DATA_FILES = re.compile(r"data/[\w.]+-\d{5}-of-\d{5}\.parquet")
SPACE_FILES = re.compile(r"(?!\.)[\w/-]+\.(py|md|css|html|js|svg)|requirements\.txt|packages\.txt|pre-requirements\.txt")

_TEXT = re.compile(r".*\.(json|md|py|txt|ya?ml|css|html|js|svg)")
_SECRET = re.compile(rb"\b(hf_[A-Za-z]{20,}|hf_[A-Za-z0-9]{30,}|github_pat_\w{20,}|ghp_\w{30,}|sk-[\w-]{30,}|AKIA[0-9A-Z]{16})\b")


def allowed_in(folder: str | Path, pattern: re.Pattern[str]) -> dict[str, Path]:
    """The files of `folder` whose path in it matches `pattern` -> {path in the repository: file}, sorted."""
    folder = Path(folder)
    found = ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: path for name, path in found if pattern.fullmatch(name)}


def refuse_secrets(files: Mapping[str, Path | bytes]) -> None:
    """ValueError naming the file when a text among `files` holds something that looks like an access token."""
    for name, content in files.items():
        if _TEXT.fullmatch(name) and _SECRET.search(content if isinstance(content, bytes) else content.read_bytes()):
            raise ValueError(f"{name} holds what looks like an access token; nothing was pushed")
