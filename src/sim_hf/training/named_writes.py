"""Errors of writing that name the file: Python's own do so for opening only, and a full disk shows while writing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within `with naming(path):` an error of the disk says what could not be written."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
