"""Takes the segmentations out of the text of a COCO file before the file is parsed.

Polygons are nine tenths of a COCO file and box training never looks at them: parsing them would cost most of the time and
memory, and a fault inside one could stop a training that has no use for it. So their text is cut out unread; what stands in
the parsed document is the number of the piece, from which mask evaluation can get the text back.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass

_WHITESPACE = rb"[ \t\r\n]*"
_KEY = re.compile(rb'(?<!\\)"segmentation"' + _WHITESPACE + rb":" + _WHITESPACE)
_NUMBERS = re.compile(rb"\[[-+0-9eE., \t\r\n\[\]]*\]")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(rb"[^,}\]\"\[{ \t\r\n]+")
_STRUCTURE = re.compile(rb'["\[\]{}]')


@dataclass(frozen=True)
class SegmentationText:
    """The segmentations as they stand in the file: piece `i` is `text[starts[i]:ends[i]]`."""

    text: bytes
    starts: array[int]
    ends: array[int]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.starts[index] : self.ends[index]]


def separate_segmentations(text: bytes) -> tuple[bytes, SegmentationText]:
    """The JSON text with every value of a key "segmentation" replaced by its number, and the values.

    A value that does not end (a file that was cut off) is left where it is: the parser then reports it.
    """
    starts, ends = array("q"), array("q")
    remainder = bytearray()
    view = memoryview(text)
    position = 0
    for key in _KEY.finditer(text):
        start = key.end()
        if start < position:  # a key inside a segmentation that is already cut out
            continue
        end = _value_end(text, start)
        if end is None:
            break
        remainder += view[position:start]
        remainder += str(len(starts)).encode()
        starts.append(start)
        ends.append(end)
        position = end
    remainder += view[position:]
    return bytes(remainder), SegmentationText(text, starts, ends)


def _value_end(text: bytes, start: int) -> int | None:
    """Where the JSON value that begins at `start` ends; None when it does not end. Looks at brackets and quotes only."""
    numbers = _NUMBERS.match(text, start)  # the usual case, lists of numbers, in one step of the regex engine
    if numbers is not None:
        value = numbers.group()
        if value.count(b"[") == value.count(b"]"):
            return numbers.end()
    first = text[start : start + 1]
    if first in (b"[", b"{"):
        return _brackets_end(text, start)
    match = (_STRING if first == b'"' else _SCALAR).match(text, start)
    return None if match is None else match.end()


def _brackets_end(text: bytes, start: int) -> int | None:
    depth, position = 0, start
    while (token := _STRUCTURE.search(text, position)) is not None:
        position = token.end()
        symbol = token.group()
        if symbol == b'"':
            string = _STRING.match(text, token.start())
            if string is None:
                return None
            position = string.end()
        elif symbol in b"[{":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return position
    return None
