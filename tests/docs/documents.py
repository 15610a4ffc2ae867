"""What the project's documents say, for tests that hold them to it: fenced blocks, commands, inline code, headings, links.

An HTML comment on the line before a block says what it needs that a plain run has not (`<!-- needs: hub -->`), or why it is not
run at all (`<!-- not run: reason -->`).
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
SPACE = ROOT / "spaces" / "box-supervised-segmentation" / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", SPACE, *DOCS]

_BLOCK = re.compile(r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of the file, of its first line of text."""

    path: Path
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document, in order; of these languages, if any are named."""
    content = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(content):
        line = content[: match.start("text")].count("\n") + 1
        text = textwrap.dedent(match["text"])
        found.append(Block(path, line, match["language"], text, match["note"] or ""))
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block: continued lines joined, comments left out."""
    lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    return [words[words[0] == "export" :] for words in lines if words]


def split_variables(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """`NAME=value program ...` -> {NAME: value}, the program and its words."""
    count = next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def sim_hf_arguments(words: list[str]) -> list[str] | None:
    """The words behind `sim-hf`, `-m sim_hf`, `scripts/train.py`, `make demo` and the like; None for other programs."""
    if words[:2] == ["make", "demo"]:
        settings = dict(word.split("=", 1) for word in words[2:])
        data = ["--data", settings["DATA"]] if "DATA" in settings else []
        return ["demo", *data, *shlex.split(settings.get("ARGS", ""))]
    for index, word in enumerate(words):
        if word == "sim-hf" or (word == "sim_hf" and words[index - 1] == "-m"):
            return words[index + 1 :]
        if re.fullmatch(r"scripts/(train|evaluate|predict)\.py", word):
            return [Path(word).stem, *words[index + 1 :]]
    return None


def prose(path: Path) -> str:
    """The document without its fenced blocks."""
    return _BLOCK.sub("", path.read_text(encoding="utf-8"))


def code_spans(path: Path) -> list[str]:
    return _SPAN.findall(prose(path))


def links(path: Path) -> list[str]:
    """Targets of links and pictures, without those on other hosts."""
    targets = _LINK.findall(_SPAN.sub("", prose(path)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """What a link can name in a document: its headings, as GitHub and the site write them."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", prose(path), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def tables(path: Path, header: str) -> list[list[list[str]]]:
    """The tables whose first line begins with `header`: the cells of each row below it."""
    found = []
    for table in re.findall(r"(?:^\|.*\|$\n?)+", prose(path), re.M):
        lines = table.strip().splitlines()
        if lines[0].startswith(header):
            found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]])
    return found
