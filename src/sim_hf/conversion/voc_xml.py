"""The XML of one picture of a Pascal VOC data set, read as what it is: text that somebody else wrote.

Elements keep their line, so that an error can name it (the standard library's trees have no lines). A document type is refused:
VOC needs none, and everything dangerous in XML (entities that grow, files that are fetched) needs one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from sim_hf.conversion.source import SourceError

MAX_BYTES = 64 * 1024**2


@dataclass
class Element:
    """A tag with its place, its text and what stands inside."""

    tag: str
    place: str  # file:line
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find_all(self, tag: str) -> list[Element]:
        """The children of that name; not what lies deeper (an `object` has parts with boxes of their own)."""
        return [child for child in self.children if child.tag == tag]

    def find(self, tag: str) -> Element:
        """The one child of that name; SourceError when there is none."""
        found = self.find_all(tag)
        if not found:
            raise SourceError(f"{self.place}: no <{tag}> in <{self.tag}>")
        return found[0]

    def number(self, tag: str) -> float:
        """The child's text as a finite number."""
        child = self.find(tag)
        try:
            value = float(child.text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SourceError(f"{child.place}: <{tag}> must be a number, got {child.text.strip()!r:.40}")
        return value


def read_xml(path: Path) -> Element:
    """The root element. SourceError with file and line for what is no XML or has a document type."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SourceError(f"{path}: {size} bytes, expected at most {MAX_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    parser = expat.ParserCreate()
    top = Element("", str(path))
    open_elements = [top]

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, f"{path}:{parser.CurrentLineNumber}")
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end(tag: str) -> None:
        open_elements.pop()

    def text(characters: str) -> None:
        open_elements[-1].text += characters

    def refuse(*declaration: object) -> None:
        raise SourceError(f"{path}:{parser.CurrentLineNumber}: a document type or entity is declared, which VOC files never need")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise SourceError(f"{path}:{error.lineno}: not XML ({expat.ErrorString(error.code)})") from None
    except (LookupError, ValueError) as error:  # an encoding that Python does not know; SourceError is a ValueError, too
        raise error if isinstance(error, SourceError) else SourceError(f"{path}: not XML ({error})") from None
    return top.children[0]
