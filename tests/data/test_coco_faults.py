"""The corrupted files as another project gets them: written, with verdicts that are those of `sim-hf check`."""

import ast
import json
import sys
from pathlib import Path

import coco_faults
from coco_faults.__main__ import main as coco_faults_main
from sim_hf.cli.check import main as check


def test_every_written_file_gets_the_verdict_that_is_written_beside_it(tmp_path, capsys):
    assert coco_faults_main(["write", str(tmp_path)]) == 0
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert {path.name for path in tmp_path.glob("*.json")} == {*verdicts, "verdicts.json"} and len(verdicts) > 100
    capsys.readouterr()
    for file, expected in verdicts.items():
        code = check([str(tmp_path / file), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert code == expected["exit_code"], file
        counts = {finding["code"]: finding["count"] for finding in report["findings"]}
        assert counts.get(expected["finding"], 0) == expected["count"], file
    assert check([str(tmp_path / "sound.json"), "--images", str(tmp_path / "images"), "--decode", "--strict"]) == 0


def test_names_are_unique_and_fit_a_file_system():
    names = [fault.name for fault in coco_faults.all_files()]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_it_needs_the_standard_library_only():
    for file in Path(coco_faults.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), file


def test_another_command_is_refused(capsys):
    assert coco_faults_main([]) == 2 and "usage" in capsys.readouterr().err
