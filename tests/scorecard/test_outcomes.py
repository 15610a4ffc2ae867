"""What counts as survived."""

from types import SimpleNamespace

from fault import Fault
from outcomes import Recorder

TEXTS = ("A", "injected", "expected", "does", "says", "then")


def recorded(left_out, collected, *faults):
    recorder = Recorder(faults, "tests", lambda outcome: None)
    recorder.pytest_deselected([SimpleNamespace(nodeid=test) for test in left_out])
    recorder.pytest_collection_finish(SimpleNamespace(items=[SimpleNamespace(nodeid=test) for test in collected]))
    return {outcome.fault.number: outcome for outcome in recorder.outcomes}


def test_a_fault_has_no_outcome_when_all_of_its_tests_are_left_out():
    fast, slow = Fault(1, "fast", *TEXTS, ("test_a.py::test_1",)), Fault(2, "slow", *TEXTS, ("test_a.py::test_2", "test_b.py"))
    outcomes = recorded(["tests/test_a.py::test_1", "tests/test_a.py::test_2[x]"], ["tests/test_b.py::test_3"], fast, slow)
    assert set(outcomes) == {2} and outcomes[2].waiting == {"tests/test_b.py::test_3"} and not outcomes[2].failed


def test_a_fault_whose_test_is_gone_has_failed():
    outcomes = recorded([], ["tests/test_a.py::test_1"], Fault(1, "gone", *TEXTS, ("test_a.py::test_1", "test_a.py::test_2")))
    assert outcomes[1].failed == ["test_a.py::test_2"] and outcomes[1].result == "FAILED"
