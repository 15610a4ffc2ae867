"""The corrupted files on disk, for a program that is not written in Python or does not want to import anything."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

from .faults import ALL_FAULTS, ESCAPING_NAMES, GARBAGE_SEGMENTATIONS, CocoFault, encode, sound_document

EXIT_CODES = {"unreadable": 2, "refused": 1, "repaired": 0, "noted": 0, "sound": 0}


def all_files() -> list[CocoFault]:
    """The sound file, all faults, file names that leave the folder, and segmentations that training on boxes never reads."""
    escaping = [
        CocoFault(f"file-name-{number:02d}-{why.replace(' ', '-')}", _with_file_name(name), "image-path", "refused")
        for number, (name, why) in enumerate(ESCAPING_NAMES.items())
    ]
    garbage = [
        CocoFault(f"segmentation-{name}", encode(sound_document()).replace(b"[[1, 1, 9, 1, 9, 9]]", content, 1), "", "sound")
        for name, content in GARBAGE_SEGMENTATIONS.items()
    ]
    return [CocoFault("sound", encode(sound_document()), "", "sound"), *ALL_FAULTS, *escaping, *garbage]


def write_files(folder: str | Path) -> dict[str, dict]:
    """Write `NAME.json` for each of `all_files`, the pictures in `images/`, and `verdicts.json` -> what stands in the last."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("1.png", "2.png", "3.png"):
        (folder / "images" / name).write_bytes(_green_png(100, 80))
    verdicts = {}
    for fault in all_files():
        file = f"{fault.name}.json"
        (folder / file).write_bytes(fault.content)
        verdicts[file] = {
            "verdict": fault.verdict,
            "exit_code": EXIT_CODES[fault.verdict],
            "finding": fault.code or None,
            "count": fault.count if fault.code else 0,
            "num_boxes": None if fault.verdict == "unreadable" else fault.num_boxes,
        }
    (folder / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n", encoding="utf-8")
    return verdicts


def _with_file_name(name: str) -> bytes:
    document = sound_document()
    document["images"][0]["file_name"] = name
    return encode(document)


def _green_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = (b"\0" + b"\0\x80\0" * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
