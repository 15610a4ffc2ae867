"""Does it work? Supervisions side by side, on the same images, weights, matching, steps and augmentation: one table.

    python benchmarks/quality.py --seeds 0 1 2                    # generated scenes, the tiny preset: two cores, a night
    python benchmarks/quality.py --size r50 --data FOLDER --seeds 0 1 2 --minutes 170     # on a GPU, as far as 170 minutes go
    python benchmarks/quality.py --rows boxinst sim sim-alpha-0 sim-alpha-1               # an ablation
    python benchmarks/quality.py --jobs 12 --data FOLDER --seeds 0 1 2 --minutes 9        # a GPU with many cores: 12 at a time
    python benchmarks/quality.py --data FOLDER FOLDER OTHER       # trained on all (one of them twice), measured on each
    python benchmarks/quality.py --table-only                     # trains nothing: docs/results.md from the finished runs

A row is scripts/configs/quality-ROW.yaml, which may only change the supervision; all other settings are those of
scripts/configs/quality-size-SIZE.yaml. The same command goes on where it stopped: a finished run has its results.json, an
unfinished one its checkpoint. Further options are those of `sim-hf train`, for all rows (--max_steps 300, --model FOLDER,
--backbone_weights FILE). Masks of training images are read by the row `full`, and to measure masks when training is over.

Runs lie in runs/quality/NAME/ROW/seed-S/, each with config.yaml, for `sim-hf train --config`. --table-only puts what they
measured into docs/results/NAME.json and writes the page from these files, so it also works where earlier runs are gone; a grid
that is called by its name again gets rows and seeds to those it has. Pictures of generated scenes stand beside the page; those
of other data stay in runs/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from quality_logs import Grid, read_grid, read_log, write_log
from quality_run import CONFIGS, OutOfTimeError, finish, make_run
from quality_table import picture_sheet, section, summary, tables, write_page
from sim_hf.data import write_scenes
from sim_hf.data.scenes import GENERATOR_NAME
from sim_hf.promptable_segmenter import UnavailableError
from sim_hf.training.assembly import coco_folder
from sim_hf.training.resume import run_identity

MAIN_ROWS = ("full", "boxinst", "level-set", "bbtp", "sim")


def all_rows() -> list[str]:
    """Names of the rows that have a file."""
    names = [path.stem.removeprefix("quality-") for path in sorted(CONFIGS.glob("quality-*.yaml"))]
    return [name for name in names if not name.startswith("size-")]


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    sizes = [path.stem.removeprefix("quality-size-") for path in sorted(CONFIGS.glob("quality-size-*.yaml"))]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--rows", nargs="+", choices=all_rows(), default=list(MAIN_ROWS), metavar="ROW", help=", ".join(all_rows())
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--size", choices=sizes, default="tiny")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="images/ + instances_{train,val}.json; several: all are trained on, each is measured (default: generated scenes)",
    )
    parser.add_argument("--name", help="of the grid (default: size and data)")
    parser.add_argument("--minutes", type=float, help="stop, with a checkpoint, after this time; the same command goes on")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each a process of its own (for a GPU and many cores)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--part-of-grid", action="store_true", help=argparse.SUPPRESS)  # grid.json is the parent's
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"), help="the page that --table-only writes")
    parser.add_argument("--table-only", action="store_true", help="train nothing, write the page from the finished runs")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options, flags = parse(argv)
    if options.table_only:
        if flags:
            raise SystemExit(f"--table-only trains nothing and takes no options of training: {' '.join(flags)}")
        write_results_page(options.runs, options.output, options.name)
        return 0
    data = options.data or [write_scenes(options.runs.parent / "scenes")]
    names = [place.name for place in dict.fromkeys(data)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SystemExit(f"two folders of --data are named {', '.join(repeated)}: their numbers could not be told apart")
    folder = options.runs / (options.name or "-".join([options.size, *names]))
    if not options.part_of_grid:
        write_grid(folder, options, data, flags)
    complete = run_grid(folder, options, data, flags) if options.jobs == 1 else run_jobs(folder, options, flags)
    grid = read_grid(folder)
    if grid.records:
        print(f"\n{tables(grid)}")
    print("all runs that can be made are finished" if complete else "the time is over; the same command goes on")
    print(f"runs: {folder}; the page with the table: python benchmarks/quality.py --table-only --runs {options.runs}")
    return 0


def run_grid(folder: Path, options: argparse.Namespace, data: Sequence[Path], flags: Sequence[str]) -> bool:
    """Seed by seed, so that every row has its first number early -> whether all runs that can be made are finished. A row
    whose label model cannot be had is skipped with a line that says so."""
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    for seed in options.seeds:
        for row in options.rows:
            place = folder / row / f"seed-{seed}"
            run = make_run(row, seed, size=options.size, data=data, folder=place, flags=flags)
            if run.results.exists():
                check_same_options(run)
                print(f"{row}, seed {seed}: finished")
                continue
            print(f"{row}, seed {seed}: {run.folder}", flush=True)
            try:
                finish(run, deadline)
            except OutOfTimeError:
                return False
            except UnavailableError as error:
                print(f"{row}, seed {seed}: skipped, {error}")
    return True


def run_jobs(folder: Path, options: argparse.Namespace, flags: Sequence[str]) -> bool:
    """`run_grid` with several runs at a time: each is this command with one row and one seed, its output in log.txt."""
    started = time.monotonic()
    runs = [(row, seed) for seed in options.seeds for row in options.rows]
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(runs), desc="runs", unit="run") as bar:

        def run(row: str, seed: int) -> bool:
            place = folder / row / f"seed-{seed}"
            command = [sys.executable, __file__, "--rows", row, "--seeds", str(seed), "--size", options.size]
            command += ["--name", folder.name, "--runs", str(options.runs), "--part-of-grid"]
            command += [] if options.data is None else ["--data", *map(str, options.data)]
            if options.minutes is not None:
                command += ["--minutes", str(options.minutes - (time.monotonic() - started) / 60)]
            place.mkdir(parents=True, exist_ok=True)
            with (place / "log.txt").open("a", encoding="utf-8") as log:
                code = subprocess.run([*command, *flags], stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            if code:
                tqdm.write(f"{row}, seed {seed}: failed with {code}, see {place / 'log.txt'}")
            bar.update()
            return (place / "results.json").exists()

        return all(list(pool.map(lambda pair: run(*pair), runs)))


def check_same_options(run) -> None:
    """A finished run must be the one that is asked for."""
    made_with = json.loads(run.results.read_text(encoding="utf-8"))["options"]
    asked = json.loads(json.dumps(run_identity(*run.arguments())))
    differing = sorted(name for name in {*made_with, *asked} if made_with.get(name) != asked.get(name))
    if differing:
        changes = "; ".join(f"{name}: {made_with.get(name)!r} then, {asked.get(name)!r} now" for name in differing)
        raise SystemExit(f"{run.folder} was made with other options ({changes}); give the grid another --name")


def describe_data(folder: Path) -> tuple[str, bool]:
    """Name and number of images, and whether they are generated scenes."""
    paths = coco_folder(folder)
    documents = [json.loads(paths[split].read_text(encoding="utf-8")) for split in ("train", "val")]
    generated = documents[0].get("info", {}).get("generator") == GENERATOR_NAME
    counts = " + ".join(str(len(document["images"])) for document in documents)
    return f"{'generated scenes' if generated else folder.name} ({counts} images)", generated


def write_grid(folder: Path, options: argparse.Namespace, data: Sequence[Path], flags: Sequence[str]) -> None:
    """What the table says about the grid, and the order of its rows; rows of earlier calls stay, also where only their log is
    at hand."""
    described = [describe_data(place) for place in dict.fromkeys(data)]
    path = folder / "grid.json"
    log = options.output.with_suffix("") / f"{folder.name}.json"
    earlier = {"rows": [], "seeds": []}
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
    elif log.exists():
        earlier = read_log(log).info
    rows = list(dict.fromkeys([*earlier["rows"], *options.rows]))
    seeds = sorted({*earlier["seeds"], *options.seeds})
    where = [] if options.data is None else ["--data", *(f"DATA/{place.name}" for place in data)]
    named = [] if options.name is None else ["--name", options.name]
    command = ["python", "benchmarks/quality.py", "--size", options.size, "--rows", *rows]
    shown = [Path(flag).name if Path(flag).is_absolute() else flag for flag in flags]  # the page names no path of the machine
    command += ["--seeds", *map(str, seeds), *where, *named, *shown]
    info = {
        "data": ", ".join(text for text, _ in described),
        "others": [place.name for place in dict.fromkeys(data)][1:],
        "size": options.size,
        "generated": all(generated for _, generated in described),
        "rows": rows,
        "seeds": seeds,
        "command": shlex.join(command),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def write_results_page(runs: Path, output: Path, name: str | None) -> None:
    """Keep what the finished runs of all grids (or the named one) measured beside the page, and write their sections from all
    that is kept there, with a sheet of pictures where the runs are at hand."""
    logs = output.with_suffix("")
    for path in sorted(runs.glob("*/grid.json")):
        if (grid := read_grid(path.parent)).records and name in (None, grid.name):
            write_log(logs / f"{grid.name}.json", grid)
    grids = [read_log(path) for path in sorted(logs.glob("*.json"))]
    chosen = [grid for grid in grids if name in (None, grid.name)]
    if not chosen:
        raise SystemExit(f"no finished run under {runs}{'' if name is None else f'/{name}'}, and none kept in {logs}")
    page = output.read_text(encoding="utf-8") if output.exists() else ""
    sections = {"summary": text} if (text := summary(grids, page)) else {}
    for grid in chosen:
        sections[grid.name] = section(grid, write_sheet(grid, runs / grid.name, output))
        print(f"\n{grid.name}\n{tables(grid)}")
    write_page(output, sections)
    print(f"written: {output}")


def write_sheet(grid: Grid, runs: Path, page: Path) -> str | None:
    """Pictures of generated scenes beside the page -> their name there, also of an earlier sheet whose runs are gone; of other
    data into the folder of the runs -> None."""
    place = page.parent / f"{page.stem}-{grid.name}.jpg" if grid.info["generated"] else runs / "sheet.jpg"
    sheet = picture_sheet(grid, runs)
    if sheet is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(place, quality=88)
        print(f"written: {place}")
    return place.name if grid.info["generated"] and place.exists() else None


if __name__ == "__main__":
    raise SystemExit(main())
