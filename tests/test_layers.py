"""The package's shape, read from its source: imports point down, files and functions stay small, names say something."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sim_hf"
FILES = sorted(SOURCE.rglob("*.py"))

# docs/architecture.md, the lowest layer first. What stands on one line may not import each other.
# visualization draws arrays and imports nothing of the package, so training may draw its validation pictures.
LAYERS = [
    {"processes", "structures"},
    {"losses", "mask_generation", "data"},
    {"criteria", "evaluation", "models", "visualization", "conversion"},
    {"hub", "label_views"},  # a trainer pushes its model with a card
    {"labeling"},  # the second phase of a training labels its images
    {"promptable_segmenter"},
    {"training"},
    {"pipeline", "onnx_export", "label_file", "prediction", "demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FRONT = {"__init__", "__main__"}  # the public face: may name anything

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def part_of(path):
    """First name below the package: `criteria` for criteria/sim.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path):
    """Dotted names of the package a relative import in this file starts from."""
    return ["sim_hf", *path.relative_to(SOURCE).parent.parts]


def imported_modules(path):
    """(line, dotted name) of everything the file imports, also inside functions; relative names are made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = module_of(path)
                base = [*package[: len(package) - node.level + 1], *base]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def imported_parts(path):
    for line, name in imported_modules(path):
        package, *rest = name.split(".")
        if package == "sim_hf" and rest:
            yield line, rest[0]


def functions_of(path):
    """(qualified name, lines from `def` to the end)"""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(SOURCE)}:{node.name}", node.end_lineno - node.lineno + 1


def test_every_part_of_the_package_has_a_layer():
    assert {part_of(path) for path in FILES} - FRONT <= set(LEVEL)


def test_imports_point_down_only():
    wrong = []
    for path in FILES:
        mine = part_of(path)
        if mine not in LEVEL:  # the public face; anything else fails above
            continue
        for line, theirs in imported_parts(path):
            down = theirs in LEVEL and LEVEL[theirs] < LEVEL[mine]
            if not (down or theirs == mine):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {theirs}")
    assert wrong == []


def test_criteria_do_not_know_the_models():
    wrong = [
        f"{path.name}:{line}"
        for path in FILES
        if part_of(path) == "criteria"
        for line, p in imported_parts(path)
        if p == "models"
    ]
    assert wrong == []


def test_an_architecture_imports_nothing_of_the_package_but_its_own_folder_and_the_parts_of_sim():
    """It can then travel to the Hub as code. The loader of remote code follows one-dot imports only, so `models/sim` has no
    others; another architecture may use single files of it, which are put beside its own when it travels."""
    wrong = []
    for path in sorted((SOURCE / "models").glob("*/*.py")):
        folder = path.parent.relative_to(SOURCE).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if node.level == 2 and (node.module or "").startswith("sim.") and path.parent.name != "sim":
                    continue
                if node.level > 1 or (node.level == 1 and "." in (node.module or "")):
                    wrong.append(f"{'/'.join(folder)}/{path.name}:{node.lineno} imports {'.' * node.level}{node.module or ''}")
            if any(name.split(".")[0] == "sim_hf" for name in names):
                wrong.append(f"{'/'.join(folder)}/{path.name}:{node.lineno} imports {names[0]}")
    assert wrong == []


def test_the_packages_do_not_import_in_a_circle():
    edges = {(part_of(path), theirs) for path in FILES if part_of(path) not in FRONT for _, theirs in imported_parts(path)}
    edges = {(mine, theirs) for mine, theirs in edges if mine != theirs}
    remaining = set(LEVEL)
    while leaves := {name for name in remaining if not any(a == name and b in remaining for a, b in edges)}:
        remaining -= leaves
    assert remaining == set()


@pytest.mark.parametrize("name", ["utils", "misc", "helpers", "common", "tools"])
def test_no_module_has_a_name_that_says_nothing(name):
    assert [str(path) for path in SOURCE.rglob(f"*{name}*.py")] == []


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    lengths = {name: length for path in FILES for name, length in functions_of(path)}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    """The reader of imports itself: absolute, relative, inside functions."""
    path = tmp_path / "losses" / "wrong.py"
    path.parent.mkdir()
    path.write_text("import sim_hf.training\ndef f():\n    from ..criteria import base\n    from .color import rgb_to_lab\n")
    monkeypatch.setattr("test_layers.SOURCE", tmp_path)
    assert sorted(imported_parts(path)) == [(1, "training"), (3, "criteria"), (4, "losses")]
