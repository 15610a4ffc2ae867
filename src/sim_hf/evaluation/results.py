"""`results.json`: the numbers of a run with all it takes to get them again, and the table that a person reads."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sim_hf.evaluation.redaction import without_secrets

PACKAGES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "timm", "pycocotools", "sim-hf")
TABLE_ROWS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
GIT_TIMEOUT_SECONDS = 10


def write_results(path: str | Path, metrics: Mapping[str, float | None], *, extra: Mapping[str, Any]) -> None:
    """Write `metrics` (0 to 1, None where there is nothing to measure) with command, versions, machine, git commit and time.

    The numbers stand at the top level under their keys (`segm/AP`, ...). `extra`: more entries beside them, such as `seed`,
    `note` or the model's name; JSON values only. The file appears whole or not at all. Besides the command, as it was
    typed, it names no path of the machine.
    """
    for key, value in metrics.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"metric {key!r} is {value}, expected a finite number or None")
    record: dict[str, Any] = {
        **{key: None if value is None else float(value) for key, value in metrics.items()},
        "seed": None,
        "command": typed_command(sys.argv, sys.orig_argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": package_versions(),
        "machine": machine(),
    }
    taken = sorted((set(record) - {"seed"}) & set(extra))
    if taken:
        raise ValueError(f"extra may not replace the entries {taken}")
    text = json.dumps(record | dict(extra), indent=2, allow_nan=False, ensure_ascii=False)
    _write_whole(Path(path), text + "\n")


def format_table(metrics: Mapping[str, float | None]) -> str:
    """The numbers in percent, masks beside boxes; "n/a" where there is nothing to measure."""

    def cell(key: str) -> str:
        value = metrics.get(key)
        return f"{'n/a':>7}" if value is None else f"{100 * value:7.2f}"

    known = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics if key.startswith(("segm/", "bbox/"))))
    recalls = [name for name in known if name.startswith("AR")]
    classes = [name for name in known if name.startswith("AP/")]
    rows = [*TABLE_ROWS, *recalls, *classes]
    width = max(len(row) for row in rows)
    lines = [f"{'':{width}}  {'mask':>7}  {'box':>7}"]
    lines += [f"{row:{width}}  {cell(f'segm/{row}')}  {cell(f'bbox/{row}')}" for row in rows]
    return "\n".join(lines)


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = "not installed"
    return versions


def machine() -> dict[str, Any]:
    """Platform, processor and threads. Not the host's name."""
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def git_state(module_file: Path = Path(__file__)) -> dict[str, Any]:
    """Commit of the checkout this code runs from, and whether tracked files were changed; "unknown" outside of one.

    An installed package may lie inside somebody else's repository: only one that tracks this very file counts.
    """
    folder = str(module_file.parent)
    if _git("-C", folder, "ls-files", "--error-unmatch", module_file.name) is None:
        return {"commit": "unknown", "dirty": None}
    commit = _git("-C", folder, "rev-parse", "HEAD")
    status = _git("-C", folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit or "unknown", "dirty": None if status is None else bool(status)}


def typed_command(arguments: list[str], original_arguments: list[str]) -> str:
    """The command as it was typed, without secrets: Python replaces the program by an absolute path, which is put back."""
    interpreter_part = original_arguments[: len(original_arguments) - len(arguments) + 1]
    program = arguments[0] if arguments else ""
    if len(interpreter_part) >= 2 and interpreter_part[-2] == "-m":
        start = ["python", "-m", interpreter_part[-1]]
    elif program in ("", "-c"):
        start = ["python", *(["-c", "..."] if program else [])]
    else:
        name = Path(program).name if Path(program).is_absolute() else program
        start = ["python", name] if name.endswith(".py") else [name]
    return shlex.join(without_secrets(word) for word in [*start, *arguments[1:]])


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            ["git", *arguments],  # noqa: S607 - git from the PATH
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader never sees half a file, and an old one survives a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
