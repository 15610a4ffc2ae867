"""docs/paper_map.md and docs/criteria.md name code, tests and options: all of them must exist."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from sim_hf.criteria.build import MASK_CRITERIA
from sim_hf.training.arguments import SupervisionArguments

ROOT = Path(__file__).parents[2]
PAPER_MAP = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
CRITERIA = (ROOT / "docs" / "criteria.md").read_text(encoding="utf-8")
CODE = sorted(set(re.findall(r"`([\w/]+\.py):(\w[\w.]*)`", PAPER_MAP + CRITERIA)))
TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAPER_MAP + CRITERIA)))


def names_defined_in(path):
    """Functions, classes, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("file", "name"), CODE, ids=":".join)
def test_code_named_in_the_documents_exists(file, name):
    assert name in names_defined_in(ROOT / "src" / "sim_hf" / file)


@pytest.mark.parametrize(("file", "name"), TESTS, ids="::".join)
def test_tests_named_in_the_documents_exist(file, name):
    assert name in names_defined_in(ROOT / "tests" / file)


def test_the_map_is_not_empty_and_every_part_of_the_method_is_on_it():
    files = {file for file, _ in CODE}
    method = {
        f"{folder}/{path.name}"
        for folder in ("losses", "mask_generation")
        for path in (ROOT / "src" / "sim_hf" / folder).glob("*.py")
    }
    not_a_formula = {
        "losses/__init__.py",
        "mask_generation/__init__.py",
        "losses/precision.py",
        "mask_generation/box_cells.py",
        "mask_generation/pseudo_masks.py",
    }
    assert method - files <= not_a_formula


def test_every_supervision_is_a_column_of_the_table():
    header = next(line for line in CRITERIA.splitlines() if line.startswith("| loss |"))
    assert {f"`{name}`" for name in MASK_CRITERIA} <= {cell.strip() for cell in header.split("|")}


def test_options_of_the_table_are_options():
    options = re.search(r"## Numbers worth knowing\n(.*)", CRITERIA, re.DOTALL).group(1)
    named = {name for row in re.findall(r"^\| (`.*?) \|", options, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named and named <= {field.name for field in dataclasses.fields(SupervisionArguments)}
