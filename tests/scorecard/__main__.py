"""`make scorecard`: inject the 36 faults, print the table, write `runs/scorecard.json` and from it `docs/reliability.md`.

ARGS="--rows 1 19" or "--fast" runs some of them and replaces their rows; "--slow" runs what `make test` leaves out, and writes
nothing. Exit status 1 when a fault was not survived.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
ROOT = TESTS.parent
RECORD = ROOT / "runs" / "scorecard.json"
PAGE = ROOT / "docs" / "reliability.md"
sys.path[:0] = [str(HERE), str(TESTS)]

import stock_tools  # noqa: E402 - the folder is a program, not a package
from fault import Fault  # noqa: E402
from outcomes import Outcome, Recorder  # noqa: E402
from registry import FAULTS  # noqa: E402
from report import page, updated_record  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make scorecard", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", metavar="NUMBER", help="these faults only")
    parser.add_argument("--fast", action="store_true", help="only faults that need no second process or server")
    parser.add_argument("--slow", action="store_true", help="only the tests that `make test` leaves out; nothing is written")
    parser.add_argument("--stock", action="store_true", help="only measure what stock tools do")
    options = parser.parse_args(argv)
    faults = [
        fault for fault in FAULTS if (options.rows is None or fault.number in options.rows) and not (options.fast and fault.slow)
    ]
    if options.slow:
        return failed(inject(faults, marked="e2e and not gpu"))
    outcomes = inject(faults) if not options.stock else []
    stock = {}
    if options.stock or len(faults) == len(FAULTS):
        print("\nstock tools in the same cases:")
        stock = stock_tools.measure(lambda number, finding: print(f"{number:02d} {finding}", flush=True))
    record = updated_record(RECORD, FAULTS, outcomes, stock)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(record, FAULTS, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return failed(outcomes)


def failed(outcomes: Sequence[Outcome]) -> int:
    """The exit status."""
    return int(any(outcome.result == "FAILED" for outcome in outcomes))


def inject(faults: Sequence[Fault], marked: str = "not gpu") -> list[Outcome]:
    """Run the tests of the faults in this process, those that are `marked` so, a line a fault as soon as it is over."""
    done = 0

    def show(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        fault = outcome.fault
        print(f"{done:>2}/{len(recorder.outcomes)}  {fault.title:<20} {outcome.seconds:>6.1f} s  {outcome.result}", flush=True)
        print(f"       {fault.injected}\n       -> {fault.expected}", flush=True)

    recorder = Recorder(faults, TESTS.name, show)
    tests = dict.fromkeys(f"{TESTS.name}/{test}" for fault in faults for test in fault.tests)
    patient = ["-o", "addopts=", "-o", "timeout=3000", "-m", marked, f"--rootdir={ROOT}"]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider"]
    pytest.main([*patient, *quiet, *tests], plugins=[recorder])
    for message in recorder.messages:
        print(f"\n{message}", file=sys.stderr)
    survived = sum(outcome.result == "survived" for outcome in recorder.outcomes)
    not_run = sum(outcome.result.startswith("not run") for outcome in recorder.outcomes)
    print(f"\n{survived} of {len(recorder.outcomes)} faults survived" + (f", {not_run} not run here" if not_run else ""))
    return recorder.outcomes


if __name__ == "__main__":
    sys.exit(main())
