"""What pytest reports, gathered by fault: a pytest plugin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from fault import Fault


@dataclass
class Outcome:
    """What became of the tests of one fault. A test that was skipped did not run, and a fault with none that ran is not
    survived."""

    fault: Fault
    waiting: set[str] = field(default_factory=set)
    passed: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def result(self) -> str:
        if self.failed or self.waiting or not (self.passed or self.skipped):
            return "FAILED"
        if self.skipped:
            total = self.passed + len(self.skipped)
            return f"not run ({len(self.skipped)} of {total} tests): {'; '.join(sorted(set(self.skipped)))}"
        return "survived"


class Recorder:
    """Sorts reports by fault; `on_done(outcome)` when the last test of a fault is over. A fault has no outcome when its markers
    leave out all of its tests."""

    def __init__(self, faults: Sequence[Fault], root: str, on_done: Callable[[Outcome], None]) -> None:
        self.root = root
        self.outcomes = [Outcome(fault) for fault in faults]
        self.on_done = on_done
        self.messages: list[str] = []
        self.left_out: set[str] = set()

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.left_out |= {item.nodeid for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for outcome in self.outcomes:
            outcome.waiting = {item.nodeid for item in session.items if self._belongs(item.nodeid, outcome.fault)}
            known = outcome.waiting | self.left_out
            if missing := [test for test in outcome.fault.tests if not any(self._matches(i, test) for i in known)]:
                outcome.failed += missing
                self.messages.append(f"{outcome.fault.title}: no such test: {', '.join(missing)}")
        self.outcomes = [outcome for outcome in self.outcomes if outcome.waiting or outcome.failed]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.messages.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        mine = [outcome for outcome in self.outcomes if self._belongs(report.nodeid, outcome.fault)]
        if report.failed:
            self.messages.append(f"{report.nodeid} ({report.when})\n{report.longreprtext}")
        for outcome in mine:
            outcome.seconds += report.duration
            if report.failed:
                outcome.failed.append(report.nodeid)
            elif report.skipped:
                outcome.skipped.append(_reason(report))
            elif report.when == "call":
                outcome.passed += 1
            if report.when == "teardown":
                outcome.waiting.discard(report.nodeid)
                if not outcome.waiting:
                    self.on_done(outcome)

    def _belongs(self, nodeid: str, fault: Fault) -> bool:
        return any(self._matches(nodeid, test) for test in fault.tests)

    def _matches(self, nodeid: str, test: str) -> bool:
        full = f"{self.root}/{test}"
        return nodeid == full or nodeid.startswith((f"{full}[", f"{full}::"))


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
