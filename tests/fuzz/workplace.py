"""Where the targets write what they are fed, and what they may import."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SPACE = TESTS.parent / "spaces" / "box-supervised-segmentation"
sys.path[:0] = [path for path in (str(TESTS), str(SPACE)) if path not in sys.path]
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")  # goes when the process ends
FOLDER = Path(_FOLDER.name)


def written(data: bytes, *names: str) -> Path:
    """A file of these bytes, below FOLDER."""
    path = FOLDER.joinpath(*names)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
