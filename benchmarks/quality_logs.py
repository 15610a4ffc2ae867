"""What the runs of a grid measured: read from their folders, and kept in the project, one file a grid. See `quality.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Grid:
    """info as `quality.py` wrote it, and the records of the finished runs by row, in the order of their seeds."""

    name: str
    info: dict[str, Any]
    records: dict[str, list[dict[str, Any]]]


def read_grid(folder: Path) -> Grid:
    """From the folders of the runs. Rows stand in the order of the grid's file; a row without a finished run is left out."""
    info = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/seed-*/results.json")]
    return Grid(folder.name, info, _by_row(info["rows"], found))


def read_log(path: Path) -> Grid:
    """From the file that `write_log` has written."""
    log = json.loads(path.read_text(encoding="utf-8"))
    return Grid(path.stem, log["grid"], _by_row(log["grid"]["rows"], log["runs"]))


def write_log(path: Path, grid: Grid) -> None:
    """One line a run. A run that the file already has is replaced by the grid's own, the others stay: the folders of earlier
    runs need not be at hand. Paths of the machine and the command as it was typed are left out."""
    runs = {(record["row"], record["seed"]): record for record in map(_without_paths, _all(grid))}
    info = dict(grid.info)
    if path.exists():
        earlier = read_log(path)
        runs = {(record["row"], record["seed"]): record for record in _all(earlier)} | runs
        info["rows"] = list(dict.fromkeys([*earlier.info["rows"], *info["rows"]]))
    lines = [json.dumps(runs[key], ensure_ascii=False) for key in sorted(runs)]
    text = f'{{"grid": {json.dumps(info, ensure_ascii=False)},\n"runs": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _by_row(rows: Sequence[str], records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = {row: sorted((r for r in records if r["row"] == row), key=lambda record: record["seed"]) for row in rows}
    return {row: of_row for row, of_row in found.items() if of_row}


def _all(grid: Grid) -> list[dict[str, Any]]:
    return [record for records in grid.records.values() for record in records]


def _without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [shown(part) for part in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    kept = {name: value for name, value in record.items() if name != "command"}
    return {**kept, "options": {name: shown(value) for name, value in record["options"].items()}}
