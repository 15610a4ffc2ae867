"""Every command, option, path and default that a document names is one: parsed by the real parsers, looked up on the disk."""

import argparse
import dataclasses
import importlib
import re
from fractions import Fraction

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from documents import DOCUMENTS, README, ROOT, blocks, code_spans, commands, sim_hf_arguments, split_variables, tables

from sim_hf.cli import COMMANDS
from sim_hf.models.architectures import PRESETS
from sim_hf.training.arguments import DataArguments, ModelArguments, RunArguments, SupervisionArguments, parse_arguments

OTHER_PROGRAMS = ("pip ", "tensorboard ")
PLACEHOLDERS = {"C.yaml": "scripts/configs/tiny-sim.yaml"}
GROUPS = (ModelArguments, DataArguments, SupervisionArguments, RunArguments)
DEFAULTS = {field.name: getattr(group(), field.name) for group in GROUPS for field in dataclasses.fields(group)}
LINES = [(block, words) for path in DOCUMENTS for block in blocks(path, "bash") for words in commands(block)]
SHELL = [(block, split_variables(words)[1]) for block, words in LINES]
OURS = [(str(block), arguments) for block, words in SHELL if (arguments := sim_hf_arguments(words)) is not None]
PATH = re.compile(r"(?:src|scripts|docs|assets|benchmarks|tests|spaces|examples|sim_hf)/[\w./-]+")
TARGETS = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.M))


class Parsed(Exception):
    """Raised in place of what a command does after it has parsed its arguments."""


@pytest.mark.parametrize(("place", "arguments"), OURS, ids=[f"{place}-{arguments[0]}" for place, arguments in OURS])
def test_a_command_of_the_documents_is_understood(place, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *options = [PLACEHOLDERS.get(word, word) for word in arguments]
    if "--help" in arguments:
        return
    assert command in COMMANDS
    if command == "train":
        parse_arguments(options)
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *given):
        parse_args(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        importlib.import_module(f"sim_hf.cli.{command.replace('-', '_')}").main(options)


def test_documents_use_every_command():
    assert {arguments[0] for _, arguments in OURS} >= set(COMMANDS)
    described = " ".join(row[0] for table in tables(README, "| command |") for row in table)
    assert set(COMMANDS) <= set(re.findall(r"[\w-]+", described))


def test_options_in_prose_are_options(monkeypatch):
    known = options_of_commands(monkeypatch) | options_of_files("benchmarks", "examples")
    known |= options_of(launch_command_parser()) | options_of(torch.distributed.run.get_args_parser())
    known |= {f"--{name}" for name in DEFAULTS} | {"--config", "--help", "--version"}
    known = {option.replace("_", "-") for option in known}
    named = {
        (path.name, option)
        for path in DOCUMENTS
        for span in code_spans(path)
        if not span.startswith(OTHER_PROGRAMS)
        for option in re.findall(r"(?<!\S)--[a-zA-Z][\w-]+", span)
    }
    assert {(file, option) for file, option in named if option.replace("_", "-") not in known} == set()


def test_paths_that_are_named_exist():
    named = {(path.name, span) for path in DOCUMENTS for span in code_spans(path) if PATH.fullmatch(span)}
    named |= {(block.path.name, word) for block, words in SHELL for word in words if PATH.fullmatch(word)}
    folders = (ROOT, ROOT / "src")
    assert {(file, name) for file, name in named if not any((folder / name).exists() for folder in folders)} == set()


def test_targets_of_make_that_are_named_exist():
    named = {(path.name, target) for path in DOCUMENTS for span in code_spans(path) for target in made_by(span.split())}
    named |= {(block.path.name, target) for block, words in SHELL for target in made_by(words)}
    assert named and {(file, target) for file, target in named if target not in TARGETS} == set()


def test_defaults_in_tables_are_the_defaults():
    checked = {}
    for path in DOCUMENTS:
        rows = [row for table in tables(path, "| option | default |") for row in table]
        for name, cell in [pair for row in rows for pair in options_of_row(row)]:
            checked[path.name, name] = (cell, DEFAULTS.get(name, f"no option {name!r}"))
    assert len(checked) > 30
    assert {key: pair for key, pair in checked.items() if not says(*pair)} == {}


def test_every_preset_is_in_the_table():
    rows = [row for table in tables(ROOT / "docs" / "training.md", "| preset | backbone |") for row in table]
    assert sorted(name for row in rows for name in re.findall(r"`([\w-]+)`", row[0])) == sorted(PRESETS)


def options_of_row(row):
    """A cell may name several options, and the next one their defaults in the same order."""
    names = re.findall(r"`(?:--)?(\w+)`", row[0])
    defaults = row[1].split(", ") if len(names) > 1 and ", " in row[1] else [row[1]] * len(names)
    return zip(names, defaults, strict=True)


def says(cell, default):
    """ "1/9 of the run" says 1/9; what has no fixed default is described in words."""
    word = cell.split()[0].strip("`")
    if default is None:
        return not re.fullmatch(r"[\d./e+-]+|true|false", word)
    if isinstance(default, bool):
        return word == str(default).lower()
    return float(Fraction(word)) == default if isinstance(default, int | float) else word == default


def made_by(words):
    return [words[1]] if words[:1] == ["make"] and len(words) > 1 and re.fullmatch(r"[a-z0-9]+", words[1]) else []


def options_of(parser):
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for choice in action.choices.values() for option in options_of(choice)}
    return found


def options_of_commands(monkeypatch):
    """The options of all commands but `train`, whose options are the dataclasses' fields."""
    seen = []

    def keep_and_stop(parser, *given):
        seen.append(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep_and_stop)
    for command in set(COMMANDS) - {"train"}:
        with pytest.raises(Parsed):
            importlib.import_module(f"sim_hf.cli.{command.replace('-', '_')}").main([])
    return {option for parser in seen for option in options_of(parser)}


def options_of_files(*folders):
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).glob("*.py")]
    return {option for source in sources for option in re.findall(r'add_argument\(\s*"(--[\w-]+)"', source)}
