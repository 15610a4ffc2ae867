"""What stock tools do in the same cases, measured where they are installed: number of the fault -> a sentence."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import stock_data
import stock_processes
import stock_services
import stock_training
import transformers

PARTS = (stock_training, stock_processes, stock_data, stock_services)
MEASUREMENTS = {number: measurement for part in PARTS for number, measurement in part.MEASUREMENTS.items()}


def measure(on_done: Callable[[int, str], None]) -> dict[int, str]:
    """Each measurement gets an empty folder and returns what it has seen; `on_done` hears of each at once."""
    findings = {}
    transformers.utils.logging.set_verbosity_error()
    for number, measurement in sorted(MEASUREMENTS.items()):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    findings[number] = measurement(Path(folder))
            except Exception as error:
                findings[number] = f"could not be measured here ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
        on_done(number, findings[number])
    return findings
