"""What the check of an annotation file found: the list of known faults, and the report that counts and names them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import orjson

Severity = Literal["error", "warning", "note"]
NUM_EXAMPLES = 5
_MAX_EXAMPLE_LENGTH = 200
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}

# code -> (severity, what it is and, after the semicolon, what the loader does about it). An error cannot be repaired; a
# warning is repaired (and an error under --strict); a note is a fact that changes nothing.
FAULTS: dict[str, tuple[Severity, str]] = {
    "unreadable": ("error", "not a readable COCO file"),
    "byte-order-mark": ("warning", "file starts with a byte order mark; it is skipped"),
    "non-finite-literal": ("warning", "NaN, Infinity or a number beyond float64, which JSON does not have; read leniently"),
    "repeated-key": ("error", "key given twice in one object, parsers keep only the last"),
    "record-type": ("error", "record that is not a JSON object"),
    # categories
    "no-categories": ("error", "the list of categories is empty"),
    "category-id": ("error", "category id missing or not a 64-bit integer"),
    "category-id-duplicate": ("error", "category id used twice"),
    "category-name": ("error", "category name missing or not text"),
    "category-name-duplicate": ("warning", "category name used twice; its id is appended"),
    "category-id-negative": ("note", "negative category id"),
    "category-unused": ("note", "category without annotations"),
    # images
    "image-id": ("error", "image id missing or not a 64-bit integer"),
    "image-id-duplicate": ("error", "image id used twice"),
    "image-id-negative": ("note", "negative image id"),
    "image-size": ("error", "image width or height missing or not a positive integer"),
    "image-path": ("error", "file_name that leaves the image folder or is no plain relative path"),
    "image-file-duplicate": ("warning", "file used by several image records"),
    "image-missing": ("error", "image file missing"),
    "image-unreadable": ("error", "image file that cannot be decoded"),
    "image-bomb": ("error", "image with more pixels than allowed"),
    "image-size-mismatch": ("error", "image file of another size than the annotation file says"),
    "image-exif-swapped": (
        "error",
        "width and height fit the stored pixels, but the EXIF orientation turns the picture, so boxes would not fit it",
    ),
    "image-exif-turned": ("note", "image with an EXIF orientation; it is turned upright and its boxes must refer to that"),
    "image-without-annotations": ("note", "image without annotations; kept as background"),
    # annotations
    "annotation-id": ("warning", "annotation id missing or not a 64-bit integer; all are numbered anew from 1"),
    "annotation-id-duplicate": ("warning", "annotation id used twice; all are numbered anew from 1"),
    "annotation-id-zero": ("warning", "annotation id 0, which COCO evaluation ignores; all are numbered anew from 1"),
    "annotation-id-negative": ("warning", "negative annotation id; all are numbered anew from 1"),
    "annotation-image-id": ("error", "image_id of an annotation missing or not a 64-bit integer"),
    "annotation-category-id": ("error", "category_id of an annotation missing or not a 64-bit integer"),
    "unknown-image": ("warning", "annotation of an image that is not listed; dropped"),
    "unknown-category": ("error", "annotation of a category that is not listed"),
    "id-converted": ("warning", "id written as a float or as text; read as an integer"),
    "area-missing": ("note", "annotation without area; the area of its box is taken"),
    "area-invalid": ("note", "area that is not a positive number; the area of the box is taken"),
    "iscrowd-missing": ("note", "annotation without iscrowd; taken as 0"),
    "iscrowd-invalid": ("warning", "iscrowd that is neither 0 nor 1; taken as 0"),
    "crowd": ("note", "crowd annotation; never trained on, ignored regions in evaluation"),
    # boxes
    "box-malformed": ("error", "bbox missing or not a list of four numbers"),
    "box-format": ("error", 'boxes look like [x1, y1, x2, y2] but COCO\'s are [x, y, width, height]; give --box-format xyxy'),
    "box-not-finite": ("warning", "box with NaN or an infinity; dropped"),
    "box-empty": ("warning", "box without width or height; dropped"),
    "box-negative": ("warning", "box with negative width or height; dropped"),
    "box-outside": ("warning", "box wholly outside its image; dropped"),
    "box-partly-outside": ("warning", "box that leaves its image; clipped"),
    "box-duplicate": ("warning", "same box, category and image as another annotation; kept"),
    # segmentations, only when masks are asked for
    "segmentation-missing": ("note", "annotation without segmentation; it has no mask"),
    "segmentation-short": ("warning", "polygon of fewer than three points; left out"),
    "segmentation-malformed": ("error", "segmentation that is neither polygons nor a run-length encoding of the image's size"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One kind of fault: how often, and the first few places."""

    code: str
    severity: Severity
    message: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass
class ValidationReport:
    """Everything that was found in one annotation file; `findings` come errors first."""

    annotation_file: str
    strict: bool = False
    num_images: int = 0
    num_annotations: int = 0
    num_categories: int = 0
    num_usable_boxes: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No errors: the file can be used."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 usable, 1 errors, 2 not readable as COCO."""
        if any(finding.code == "unreadable" for finding in self.findings):
            return 2
        return 0 if self.ok else 1

    def count(self, code: str) -> int:
        """How often the fault was found."""
        if code not in FAULTS:
            raise ValueError(f"unknown fault {code!r}, expected one of {', '.join(FAULTS)}")
        return sum(finding.count for finding in self.findings if finding.code == code)

    def add(self, code: str, examples: Iterable[str], count: int) -> None:
        """Record `count` faults; only the first few examples are drawn from the iterable."""
        if count == 0:
            return
        severity, message = FAULTS[code]
        if self.strict and severity == "warning":
            severity = "error"
        shown = tuple(_one_line(example) for example in islice(examples, min(NUM_EXAMPLES, count)))
        self.findings.append(Finding(code, severity, message, count, shown))
        self.findings.sort(key=lambda finding: _ORDER[finding.severity])

    def first_error(self) -> str | None:
        """One line with file and place of the first error, for an exception."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if not errors:
            return None
        first = errors[0]
        place = f": {first.examples[0]}" if first.examples else ""
        more = f" (and {first.count - 1} more)" if first.count > 1 else ""
        others = f"; {len(errors) - 1} other kinds of error" if len(errors) > 1 else ""
        if first.code == "unreadable":
            return first.examples[0]
        return f"{self.annotation_file}: {first.message}{place}{more}{others}; `sim-hf check` lists all"

    def repairs(self) -> str | None:
        """One line that counts what was repaired, None when nothing had to be."""
        parts = [f"{f.count} x {f.message}" for f in self.findings if f.severity == "warning"]
        return f"{self.annotation_file}: " + " | ".join(parts) if parts else None

    def to_json(self) -> str:
        """The report as a JSON object (indented text)."""
        document = {
            "annotation_file": self.annotation_file,
            "ok": self.ok,
            "exit_code": self.exit_code,
            "strict": self.strict,
            "num_images": self.num_images,
            "num_annotations": self.num_annotations,
            "num_categories": self.num_categories,
            "num_usable_boxes": self.num_usable_boxes,
            "findings": [
                {
                    "code": f.code,
                    "severity": f.severity,
                    "message": f.message,
                    "count": f.count,
                    "examples": list(f.examples),
                }
                for f in self.findings
            ],
        }
        return orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()

    def __str__(self) -> str:
        lines = [
            f"{self.annotation_file}: {self.num_images} images, {self.num_annotations} annotations "
            f"({self.num_usable_boxes} usable), {self.num_categories} categories"
        ]
        for finding in self.findings:
            lines.append(f"{finding.severity:<8}{finding.count:>8}  {finding.code:<26}{finding.message}")
            lines.extend(f"{'':<18}{example}" for example in finding.examples)
        counts = {s: sum(f.severity == s for f in self.findings) for s in _ORDER}
        verdict = "usable" if self.ok else ("not readable" if self.exit_code == 2 else "not usable")
        lines.append(f"{verdict}: {counts['error']} kinds of error, {counts['warning']} of warning, {counts['note']} notes")
        return "\n".join(lines)


def _one_line(text: str) -> str:
    """File names and values come from outside: no control characters on the terminal, no endless lines."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: 2 * _MAX_EXAMPLE_LENGTH])
    return text if len(text) <= _MAX_EXAMPLE_LENGTH else text[: _MAX_EXAMPLE_LENGTH - 3] + "..."
