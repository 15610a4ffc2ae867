"""From the logs of the comparison of supervisions to a table and a sheet of pictures. See `quality.py`."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from quality_logs import Grid
from quality_run import ROW_OPTIONS
from sim_hf.visualization import contact_sheet

PERCENT, PLAIN = 100.0, 1.0
# title, key in results.json, factor, digits
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("mask AP", "segm/AP", PERCENT, 1),
    ("AP50", "segm/AP50", PERCENT, 1),
    ("AP75", "segm/AP75", PERCENT, 1),
    ("small", "segm/AP_small", PERCENT, 1),
    ("medium", "segm/AP_medium", PERCENT, 1),
    ("large", "segm/AP_large", PERCENT, 1),
    ("box AP", "bbox/AP", PERCENT, 1),
    ("mask IoU", "matched_mask_iou", PLAIN, 3),
    ("pseudo IoU", "pseudo_mask_iou", PLAIN, 3),
    ("fill", "fill", PLAIN, 2),
    ("corners", "corners", PLAIN, 2),
    ("leak", "leak", PLAIN, 2),
    ("cosine", "prototype_cosine", PLAIN, 2),
    ("use", "prototype_usage", PLAIN, 2),
)
SIM_ROWS = ("sim", "sim-long")  # what the summary compares with BoxInst and full masks: the defaults, and those for long runs
LEGEND = """\
Mean over the seeds ± standard deviation. AP is COCO's, in percent, on the validation images; small, medium, large: mask AP by
size. On training images, against the real masks, which only `full` was trained with: *mask IoU* of the network's mask of each
given box, *pseudo IoU* of the pseudo masks; *fill*, *corners* and *leak* of the network's masks (share of the box that is
covered, share of its corners, share of the mask that lies outside). *cosine* and *use*: how alike the prototypes of a class are
(1 = collapsed) and how evenly they are used (1 = evenly).
"""
PAGE_TITLE = f"# Supervisions compared\n\n{LEGEND}"
SHEET_CELL = 260


def summary(grids: Sequence[Grid], page: str = "") -> str:
    """The paper's question, one line for every grid, set of validation images and row of `SIM_ROWS` that can answer it; empty
    where none can. Lines of `page` (its text) about grids that are not at hand stay."""
    lines = {name: lines for name, lines in _summary_lines_of(page).items() if name not in {grid.name for grid in grids}}
    for grid in grids:
        sets = ["", *(f"{other}/" for other in grid.info.get("others", []))]
        for data, prefix in zip(grid.info["data"].split(", ", len(sets) - 1), sets, strict=True):
            ap = {
                row: {record["seed"]: record[f"{prefix}segm/AP"] for record in grid.records.get(row, [])}
                for row in ("boxinst", "full", *SIM_ROWS)
            }
            for row in SIM_ROWS:
                seeds = sorted(set(ap["boxinst"]) & set(ap[row]))
                if seeds and ap["full"]:
                    boxinst, sim = [ap["boxinst"][seed] for seed in seeds], [ap[row][seed] for seed in seeds]
                    full = list(ap["full"].values())
                    gains = [ours - theirs for ours, theirs in zip(sim, boxinst, strict=True)]
                    cells = [_cell(values, PERCENT, 1) for values in (boxinst, sim, full, gains)]
                    share = f"{statistics.mean(sim) / statistics.mean(full):.0%}"
                    named = [data, f"`{grid.name}`", f"`{row}`", f"{len(seeds)}, {len(full)}"]
                    lines.setdefault(grid.name, []).append("| " + " | ".join([*named, *cells, share]) + " |")
    head = [
        "| validation images | table | SIM | seeds, of `full` | `boxinst` | SIM | `full` | SIM - `boxinst` | SIM / `full` |",
        "|---" * 9 + "|",
    ]
    return "\n".join([*head, *(line for name in sorted(lines) for line in lines[name]), ""]) if lines else ""


def _summary_lines_of(page: str) -> dict[str, list[str]]:
    block = re.search(r"<!-- summary -->\n(.*?)<!-- end of summary -->", page, re.DOTALL)
    found: dict[str, list[str]] = {}
    for line in block[1].splitlines() if block else []:
        if name := re.match(r"\| .*? \| `(.+?)` \| `.+?` \| \d", line):
            found.setdefault(name[1], []).append(line)
    return found


def tables(grid: Grid) -> str:
    """Of the first folder of the data, and for each other one its AP."""
    return "\n\n".join([table(grid), *(table_of_other(grid, name) for name in grid.info.get("others", []))])


def table_of_other(grid: Grid, name: str) -> str:
    """AP on the validation images of another folder that was trained on as well."""
    columns = [column for column in COLUMNS if "/" in column[1]]
    lines = [f"| validation images of {name} | " + " | ".join(title for title, *_ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row, records in grid.records.items():
        cells = [_cell([record.get(f"{name}/{key}") for record in records], factor, digits) for _, key, factor, digits in columns]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(grid: Grid) -> str:
    """One line for each row of the grid, and one for boxes filled in."""
    lines = ["| supervision | " + " | ".join(title for title, *_ in COLUMNS) + " | seeds | steps |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for row, records in grid.records.items():
        cells = [_cell([record.get(key) for record in records], factor, digits) for _, key, factor, digits in COLUMNS]
        lines.append(
            f"| `{row}` | " + " | ".join(cells) + f" | {len(records)} | {_joined(record['steps'] for record in records)} |"
        )
    filled = [record.get("filled_box_iou") for records in grid.records.values() for record in records[:1]][:1]
    cells = [_cell(filled, factor, digits) if key == "matched_mask_iou" else "" for _, key, factor, digits in COLUMNS]
    lines.append("| boxes filled in | " + " | ".join(cells) + " | | |")
    return "\n".join(lines)


def section(grid: Grid, picture: str | None = None) -> str:
    """The table with all that it takes to make it again. picture: path of the sheet, relative to the page."""
    everything = [record for records in grid.records.values() for record in records]
    seconds = [record["seconds_per_step"] for record in everything if record["seconds_per_step"]]
    lines = [
        f"## {grid.info['data']}, {grid.info['size']}",
        "",
        tables(grid),
        "",
        f"* Command: `{grid.info['command']}`",
        f"* Hardware: {_joined(_hardware(record['machine']) for record in everything)}"
        + (f"; {statistics.median(seconds):.2f} s a step (median over the runs)" if seconds else ""),
        f"* Commit: {_joined(_commit(record['git']) for record in everything)}",
        f"* Date: {_joined(record['time'][:10] for record in everything)}",
        f"* Start: {_start(grid)}",
    ]
    if picture is not None:
        lines += ["", f"![The same validation images, one column for each supervision (seed {_first_seed(grid)})]({picture})"]
    return "\n".join(lines) + "\n"


def write_page(path: Path, sections: dict[str, str]) -> None:
    """Replace the sections of these grids in the page, keep those of others, add new ones at the end."""
    text = path.read_text(encoding="utf-8") if path.exists() else PAGE_TITLE
    for name, content in sections.items():
        block = f"<!-- {name} -->\n{content}<!-- end of {name} -->\n"
        pattern = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end of {re.escape(name)} -->\n", re.DOTALL)
        text = pattern.sub(lambda _, block=block: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def picture_sheet(grid: Grid, runs: Path) -> Image.Image | None:
    """The same images in every line: the given boxes, then one column for each row, all of the first seed. runs: the folder
    of the grid's runs."""
    seed = _first_seed(grid)
    folders = {row: runs / row / f"seed-{seed}" / "pictures" for row in grid.records}
    folders = {row: folder for row, folder in folders.items() if folder.is_dir()}
    if not folders:
        return None
    first = next(iter(folders.values()))
    lines = []
    for index in range(len(list(first.glob("*-given.jpg")))):
        paths = [first / f"{index}-given.jpg", *(folder / f"{index}.jpg" for folder in folders.values())]
        lines.append([Image.open(path).convert("RGB") if path.exists() else None for path in paths])
    return contact_sheet(lines, titles=["given boxes", *folders], cell_size=SHEET_CELL)


def _first_seed(grid: Grid) -> int:
    return min(record["seed"] for records in grid.records.values() for record in records)


def _cell(values: Sequence[float | None], factor: float, digits: int) -> str:
    known = [factor * value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def _joined(texts) -> str:
    """What the runs say, each once, in the order of the runs."""
    return ", ".join(str(text) for text in dict.fromkeys(texts))


def _hardware(machine: dict[str, Any]) -> str:
    gpus = ", ".join(machine["gpus"])
    return gpus or f"{machine['cpu']}, {machine['threads']} of {machine['cpu_count']} threads"


def _commit(git: dict[str, Any]) -> str:
    return f"`{git['commit'][:10]}`" + (" with changes" if git["dirty"] else "")


def _start(grid: Grid) -> str:
    """Whether the rows of a seed began with the same weights, and all runs had the same settings: said, not assumed."""
    by_seed: dict[int, dict[str, list[str]]] = {}
    settings: dict[str, set[str]] = {}
    for row, records in grid.records.items():
        for record in records:
            by_seed.setdefault(record["seed"], {}).setdefault(record["initial_weights"], []).append(f"`{row}`")
            for name, value in record["options"].items():
                settings.setdefault(name, set()).add(json.dumps(value))
    other = dict.fromkeys(row for rows in by_seed.values() for group in sorted(rows.values(), key=len)[:-1] for row in group)
    same = "the same weights, images in the same order and augmentation in every row of a seed"
    if other:
        same += f", but other weights in {', '.join(other)}"
    free = ROW_OPTIONS | {"seed"}
    differing = sorted(name for name, values in settings.items() if len(values) > 1 and name not in free)
    return same if not differing else f"{same}. NOT COMPARABLE: the runs differ in {', '.join(differing)}"
