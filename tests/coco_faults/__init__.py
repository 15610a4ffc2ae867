"""Corrupted COCO files by name, each with the verdict that a check should give. Standard library only; see README.md."""

from .faults import ALL_FAULTS, ESCAPING_NAMES, GARBAGE_SEGMENTATIONS, CocoFault, encode, sound_document
from .files import EXIT_CODES, all_files, write_files

__all__ = [
    "ALL_FAULTS",
    "ESCAPING_NAMES",
    "EXIT_CODES",
    "GARBAGE_SEGMENTATIONS",
    "CocoFault",
    "all_files",
    "encode",
    "sound_document",
    "write_files",
]
