"""Checkpoints that are there whole or not at all, without pickle.

A checkpoint is a folder `step-00000123`. It is written under a temporary name, its `manifest.json` (size and sha256 of every
file) comes last, and one rename makes it exist; only then may an older one go. So a kill or a full disk at any moment leaves
the previous checkpoint valid, and resuming takes the newest folder whose manifest verifies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sim_hf.training.state_files import CheckpointError, load_state, save_state

__all__ = ["CheckpointError", "CheckpointManager", "check_metadata", "load_state", "read_metadata", "save_state", "verify"]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MIN_KEEP = 2  # one could be lost to a flipped bit
_UNFINISHED = ".unfinished"  # lies in the temporary folder; a rank that fails takes it away, which needs no disk space
_REPLACED = ".replaced-"  # an older checkpoint of the same step, while the new one takes its name
_STEP_FOLDER = re.compile(r"(?:\.replaced-)?step-(\d{8,})")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_VERSIONED_PACKAGES = ("torch", "transformers", "sim-hf")


def verify(path: str | Path) -> list[str]:
    """Everything that is wrong with a checkpoint folder, one line each; an empty list means every byte is as written."""
    folder = Path(path)
    try:
        manifest = _read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{folder.name}/{name} is missing")
        elif file.stat().st_size != facts["size"]:
            problems.append(f"{folder.name}/{name} has {file.stat().st_size} bytes instead of {facts['size']}")
        elif _sha256(file) != facts["sha256"]:
            problems.append(f"{folder.name}/{name} has changed since it was written (sha256 differs)")
    return problems


def write_manifest(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Put size and sha256 of every file of `folder`, and `metadata` with `versions`, into its manifest.json, after all of
    them have reached the disk."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        _sync(file)
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    content = {"files": files, "metadata": {**metadata, "versions": _versions()}}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1), encoding="utf-8")
    _sync(manifest)
    for subfolder in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(subfolder)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The `metadata` a checkpoint was saved with, plus `step` and `versions`."""
    return _read_manifest(Path(path))["metadata"]


def check_metadata(path: str | Path, expected: Mapping[str, Any], *, allow: Collection[str] = ()) -> None:
    """Refuse a checkpoint whose metadata differs from `expected`, naming every field; those in `allow` are only logged."""
    saved = read_metadata(path)
    differing = []
    for field, value in expected.items():
        if field in saved and saved[field] == json.loads(json.dumps(value)):
            continue
        line = f"{field}: the checkpoint has {saved.get(field, 'nothing')!r}, this run has {value!r}"
        if field in allow:
            logger.warning("%s: resuming although %s", Path(path).name, line)
        else:
            differing.append(line)
    if differing:
        raise CheckpointError(f"{Path(path).name} is from another run. " + "; ".join(differing))


class CheckpointManager:
    """The checkpoints of one run: `save` adds one and lets old ones go, `latest` finds the newest valid one.

    keep: how many of the newest valid checkpoints stay, at least 2.
    """

    def __init__(self, root: str | Path, *, keep: int = MIN_KEEP) -> None:
        if keep < MIN_KEEP:
            raise ValueError(f"keep must be at least {MIN_KEEP}, so that one damaged checkpoint can be survived, got {keep}")
        self.root = Path(root)
        self.keep = keep

    def save(
        self,
        step: int,
        writer: Callable[[Path], None],
        *,
        metadata: Mapping[str, Any],
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
        protect: Collection[int] = frozenset(),
    ) -> Path:
        """Let `writer(folder)` write the files and make them the checkpoint of `step`. -> its folder

        All ranks call it; each writes files of its own names (`rank{r}.*`), the main one also the common files. `protect`:
        steps that stay for ever, such as the best. A failure on one rank fails all of them, and leaves no temporary folder.
        """
        try:
            metadata = json.loads(json.dumps(metadata, allow_nan=False))  # as it will be read back, keys are strings
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"metadata of step {step} must be plain JSON values: {error}") from error
        final = self.root / f"step-{step:08d}"
        temporary = self.root / f".tmp-{final.name}"  # no process id in the name: all ranks must agree on it
        failure = self._attempt(lambda: self._open(temporary)) if is_main else None
        barrier()
        if failure is None:
            failure = self._attempt(lambda: writer(temporary))
            if failure is not None:
                with contextlib.suppress(OSError):
                    (temporary / _UNFINISHED).unlink(missing_ok=True)
        barrier()
        if is_main and failure is None:
            failure = self._attempt(lambda: self._publish(temporary, final, step, metadata))
        if is_main and failure is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        if failure is not None:
            raise self._explain(step, failure) from failure
        if not is_main and not final.is_dir():
            raise CheckpointError(f"checkpoint of step {step}: the main process could not finish it")
        if is_main:
            self._rotate(step, protect)
        return final

    def latest(self) -> Path | None:
        """The newest valid checkpoint, or None when there never was one. Invalid ones are skipped with a warning; when there
        are only invalid ones it is an error, for a run must not start from scratch without a word."""
        problems = []
        for folder in self.checkpoints():
            found = verify(folder)
            if not found:
                return folder
            problems += found
            logger.warning("skipping checkpoint %s: %s", folder.name, "; ".join(found))
        if problems:
            raise CheckpointError("there are checkpoints, but none is valid: " + "; ".join(problems))
        return None

    def checkpoints(self) -> list[Path]:
        """All checkpoint folders, newest first, valid or not."""
        if not self.root.is_dir():
            return []
        names = [path.name for path in self.root.iterdir() if _STEP_FOLDER.fullmatch(path.name)]
        current = [name for name in names if name.removeprefix(_REPLACED) == name or name.removeprefix(_REPLACED) not in names]
        return sorted((self.root / name for name in current), key=_step_of, reverse=True)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, newest first, valid or not."""
        return [_step_of(folder) for folder in self.checkpoints()]

    def metadata(self, path: str | Path) -> dict[str, Any]:
        """What the checkpoint at `path` was saved with, plus `step` and `versions`. Every file is verified first: a
        CheckpointError names those that are missing or changed."""
        problems = verify(path)
        if problems:
            raise CheckpointError(f"{Path(path).name} cannot be used: " + "; ".join(problems))
        return read_metadata(path)

    def set_aside_later(self, step: int) -> None:
        """Rename the checkpoints after `step`. For a run that goes back to an older one: `latest` must not return to the
        branch it left."""
        for folder in self.checkpoints():
            if _step_of(folder) > step:
                target = self.root / f"set-aside-{folder.name}"
                shutil.rmtree(target, ignore_errors=True)
                logger.warning("checkpoint %s is later than step %d, renamed to %s", folder.name, step, target.name)
                folder.rename(target)

    @staticmethod
    def _attempt(action: Callable[[], None]) -> Exception | None:
        """Do it; an exception comes back as a value, because the other ranks wait at the barrier and must hear of it first."""
        try:
            action()
        except Exception as error:
            return error
        return None

    def _open(self, temporary: Path) -> None:
        self._clean_up()
        temporary.mkdir(parents=True)
        (temporary / _UNFINISHED).touch()

    def _publish(self, temporary: Path, final: Path, step: int, metadata: Mapping[str, Any]) -> None:
        try:
            (temporary / _UNFINISHED).unlink()
        except FileNotFoundError as error:
            raise CheckpointError("another process could not write its files") from error
        write_manifest(temporary, {**metadata, "step": step})
        replaced = self.root / f"{_REPLACED}{final.name}"
        if final.exists():  # the same step again, after going back: until the second rename, `checkpoints` lists the old
            final.rename(replaced)
        temporary.rename(final)
        _sync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def _rotate(self, step: int, protect: Collection[int]) -> None:
        """Delete what is older than the `keep` newest valid checkpoints. The one of `step` has just been written."""
        kept = 0
        for folder in self.checkpoints():
            if _step_of(folder) > step:
                logger.warning("checkpoint %s is later than the one just saved (step %d)", folder.name, step)
            elif kept < self.keep:
                kept += _step_of(folder) == step or not verify(folder)
            elif _step_of(folder) not in protect:
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    logger.warning("checkpoint %s is no longer needed, but cannot be deleted: %s", folder.name, error)

    def _clean_up(self) -> None:
        """Remove what a killed save left."""
        for path in self.root.glob(f"{_REPLACED}*"):
            final = self.root / path.name.removeprefix(_REPLACED)
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        for path in self.root.glob(".tmp-*"):
            logger.warning("removing %s, left by a save that did not finish", path.name)
            shutil.rmtree(path)

    def _explain(self, step: int, failure: Exception) -> Exception:
        """A full disk in words; our own errors and a writer's bugs stay what they are."""
        if not isinstance(failure, (OSError, SafetensorError, CheckpointError)):
            return failure
        is_full = isinstance(failure, OSError) and failure.errno in _OUT_OF_SPACE
        cause = "no space" if is_full else type(failure).__name__
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.root).free / 1e9:.3f} GB"
        previous = self.checkpoints()
        rest = f"the previous one, {previous[0].name}, is untouched" if previous else "there is no earlier one"
        return CheckpointError(f"checkpoint of step {step} not written ({cause}: {failure}); free space {free}; {rest}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    name = f"{folder.name}/{MANIFEST}"
    if not folder.is_dir():
        raise CheckpointError(f"{folder.name} is not a folder")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{name} is missing")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = {"files": manifest["files"], "metadata": manifest["metadata"]}
        is_intact = manifest["sha256"] == _digest(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: {error!r}") from error
    if not is_intact:
        raise CheckpointError(f"{name} has changed since it was written (sha256 differs)")
    if _STEP_FOLDER.fullmatch(folder.name) and content["metadata"]["step"] != _step_of(folder):
        raise CheckpointError(f"{name} is of step {content['metadata']['step']}")
    return content


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_REPLACED).removeprefix("step-"))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
