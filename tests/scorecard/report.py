"""The page for people and the record for programs."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from fault import HARM, Fault
from outcomes import Outcome

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "pycocotools", "pillow", "gradio")
INTRODUCTION = """# Reliability

<!-- Written by `make scorecard`: do not edit. -->

{passed} of {total} injected faults were survived in the last run of `make scorecard`{not_run}. Each row is one or more tests that inject the real fault:
a SIGKILL at every file operation, a full disk, a rank without objects, a picture that unfolds into a gigabyte. The last column says what a stock tool
does in the same case: *measured* by the same command with the versions below, or *known* from its source.
"""


def write_record(path: Path, outcomes: Sequence[Outcome], stock: Mapping[int, str]) -> None:
    record = {
        "passed": sum(outcome.result == "survived" for outcome in outcomes),
        "total": len(outcomes),
        "rows": [
            {
                "number": outcome.fault.number,
                "name": outcome.fault.name,
                "harm": outcome.fault.harm,
                "fault": outcome.fault.injected,
                "expected": outcome.fault.expected,
                "result": outcome.result,
                "seconds": round(outcome.seconds, 1),
                "num_tests": outcome.passed,
                "stock": stock_finding(outcome.fault, stock),
            }
            for outcome in outcomes
        ],
        "cuda": torch.cuda.is_available(),
        "versions": versions(),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_document(path: Path, outcomes: Sequence[Outcome], stock: Mapping[int, str]) -> None:
    not_run = sum(outcome.result.startswith("not run") for outcome in outcomes)
    introduction = INTRODUCTION.format(
        passed=sum(outcome.result == "survived" for outcome in outcomes),
        total=len(outcomes),
        not_run=f" ({not_run} could not run there)" if not_run else "",
    )
    path.write_text(
        "\n".join([introduction, table(outcomes, stock), closing(outcomes), details([o.fault for o in outcomes])]),
        encoding="utf-8",
    )


def table(outcomes: Sequence[Outcome], stock: Mapping[int, str]) -> str:
    lines = ["| | name | harm | fault | expected | result | tests | s | a stock tool |", "|---|---|---|---|---|---|---|---|---|"]
    for outcome in outcomes:
        fault = outcome.fault
        cells = [
            f"[{fault.number}](#{anchor(fault)})",
            fault.name,
            fault.harm,
            fault.injected,
            fault.expected,
            outcome.result,
            str(outcome.passed),
            f"{outcome.seconds:.0f}",
            stock_finding(fault, stock),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    legend = "; ".join(f"{letter} {text}" for letter, text in HARM.items())
    return "\n".join([*lines, "", f"Harm: {legend}."])


def closing(outcomes: Sequence[Outcome]) -> str:
    numbers = ", ".join(str(outcome.fault.number) for outcome in outcomes if outcome.fault.gpu_tests)
    where = "ran" if torch.cuda.is_available() else "did not run: there was no GPU"
    return (
        f"\nRows {numbers} are about half precision and are counted on the CPU. Their tests on CUDA (`pytest -m gpu tests/scorecard`) {where}.\n\n"
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}.\n"
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


def anchor(fault: Fault) -> str:
    return f"{fault.number}-{fault.name}"


def stock_finding(fault: Fault, stock: Mapping[int, str]) -> str:
    if fault.number in stock:
        return f"measured: {stock[fault.number]}"
    return f"known: {fault.stock}" if fault.stock and fault.stock != "not measured" else "not measured"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
