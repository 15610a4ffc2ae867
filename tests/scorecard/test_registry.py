"""The list of faults: all 36 are there, the tests that it names exist, and the page says what it says."""

import ast
from functools import cache
from pathlib import Path

import pytest
from fault import HARM
from registry import FAULTS
from report import details

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"


@cache
def functions_of(file):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_36_faults_with_names_of_their_own():
    assert [fault.number for fault in FAULTS] == list(range(1, 37))
    assert len({fault.name for fault in FAULTS}) == 36
    assert {fault.harm for fault in FAULTS} <= set(HARM)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_the_tests_of_a_fault_exist(fault):
    assert fault.tests
    for test in (*fault.tests, *fault.gpu_tests):
        file, _, name = test.partition("::")
        assert (name in functions_of(file)) if name else functions_of(file), test


def test_the_page_tells_of_every_fault():
    """`make scorecard ARGS=--stock` writes it anew after a change of the list."""
    assert details(FAULTS) in PAGE.read_text(encoding="utf-8")
