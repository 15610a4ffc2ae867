"""The Python of README and docs/ runs: the blocks of a page in their order, and the examples in docstrings.

Blocks that need a Hub, a running Space or minutes of training run with the README's other lines (test_readme_walkthrough.py).
"""

import doctest
import importlib

import pytest
from documents import DOCS, README, ROOT, blocks

NOTATION = ROOT / "docs" / "architecture.md"  # signatures and records, not programs
PAGES = {path.relative_to(ROOT).as_posix(): blocks(path, "python") for path in [README, *DOCS] if path != NOTATION}
SOURCES = sorted((ROOT / "src" / "sim_hf").rglob("*.py"))
WITH_EXAMPLES = [".".join(p.relative_to(ROOT / "src").with_suffix("").parts) for p in SOURCES if ">>> " in p.read_text()]


@pytest.mark.parametrize("page", [page for page, found in PAGES.items() if any(not block.note for block in found)])
def test_the_python_of_a_page_runs(page, workplace):
    names = {"__name__": "documents"}
    for block in PAGES[page]:
        if not block.note:
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)  # errors show the line of the page


def test_notes_say_what_is_missing():
    notes = {block.note for found in PAGES.values() for block in found if block.note}
    assert all(note in ("needs: hub", "needs: space", "needs: training") or note.startswith("not run: ") for note in notes)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name, workplace):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
