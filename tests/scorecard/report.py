"""The record of the scorecard for programs, and the page for people that is made of it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fault import HARM, Fault
from outcomes import Outcome

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "pycocotools", "pillow", "gradio")
BY_HAND = "<!-- Written by hand from here on. -->"
INTRODUCTION = """# Reliability

<!-- Written by `make scorecard`, but for its end: do not edit. -->

{passed} of {total} injected faults were survived when `make scorecard` last injected them{rest}. Each row is one test or more
that injects the real fault: a SIGKILL at every file operation, a full disk, a rank without objects, a picture that unfolds
into a gigabyte. Most of the tests run with every `make test`; `make scorecard ARGS=--slow` runs the others, as CI does. The
last column says what a stock tool does in the same case, measured by the same command with the versions below.
"""


def updated_record(path: Path, faults: Sequence[Fault], outcomes: Sequence[Outcome], stock: Mapping[int, str]) -> dict[str, Any]:
    """The record at `path` with the rows of these outcomes replaced; a fault that never ran here is "not run"."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    rows = {row["number"]: row for row in old["rows"]}
    for outcome in outcomes:
        rows[outcome.fault.number] = {
            **rows.get(outcome.fault.number, {}),
            "result": outcome.result,
            "seconds": round(outcome.seconds, 1),
            "num_tests": outcome.passed,
        }
    complete = [
        {**_described(fault), **_measured(rows.get(fault.number)), "stock": _stock(fault, stock, rows)} for fault in faults
    ]
    return {
        "passed": sum(row["result"] == "survived" for row in complete),
        "total": len(complete),
        "cuda": torch.cuda.is_available(),
        "versions": versions(),
        "rows": complete,
    }


def _described(fault: Fault) -> dict[str, Any]:
    return {
        "number": fault.number,
        "name": fault.name,
        "harm": fault.harm,
        "fault": fault.injected,
        "expected": fault.expected,
    }


def _measured(row: Mapping[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return {"result": "not run", "seconds": 0.0, "num_tests": 0}
    return {name: row[name] for name in ("result", "seconds", "num_tests")}


def _stock(fault: Fault, stock: Mapping[int, str], rows: Mapping[int, Mapping[str, Any]]) -> str:
    return stock.get(fault.number) or rows.get(fault.number, {}).get("stock", "not measured")


def page(record: Mapping[str, Any], faults: Sequence[Fault], old_page: str = "") -> str:
    """The page anew; what was written by hand at the end of the old one stays."""
    failed = sum(row["result"] == "FAILED" for row in record["rows"])
    not_run = record["total"] - record["passed"] - failed
    rest = "".join(f", {count} {what}" for count, what in ((failed, "were not"), (not_run, "could not run there")) if count)
    introduction = INTRODUCTION.format(passed=record["passed"], total=record["total"], rest=rest)
    _, mark, by_hand = old_page.partition(BY_HAND)
    return (
        "\n".join([introduction, table(record["rows"]), closing(record, faults), details(faults), mark + by_hand]).rstrip() + "\n"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| | name | harm | fault | expected | result | tests | s | a stock tool |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        number = f"[{row['number']}](#{row['number']}-{row['name']})"
        counts = (str(row["num_tests"]), f"{row['seconds']:.0f}")
        cells = [number, row["name"], row["harm"], row["fault"], row["expected"], row["result"], *counts, row["stock"]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    legend = "; ".join(f"{letter} {text}" for letter, text in HARM.items())
    return "\n".join([*lines, "", f"Harm: {legend}. Seconds are those of the machine and of what else it did."])


def closing(record: Mapping[str, Any], faults: Sequence[Fault]) -> str:
    numbers = ", ".join(str(fault.number) for fault in faults if fault.gpu_tests)
    where = "can run there too" if record["cuda"] else "did not run: there was no GPU"
    return (
        f"\nRows {numbers} are about half precision and are counted on the CPU. Their tests on CUDA (`pytest -m gpu "
        f"tests/scorecard`) {where}.\n\n"
        f"Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}.\n"
    )


def details(faults: Sequence[Fault]) -> str:
    parts = ["## What happens, what is said, what to do\n"]
    for fault in faults:
        parts.append(
            f"### {fault.number}. {fault.name}\n\n"
            f"Fault: {fault.injected}.\n\n"
            f"* The program: {fault.does}.\n"
            f"* It says: {fault.says}.\n"
            f"* You: {fault.then}.\n"
        )
    return "\n".join(parts)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
