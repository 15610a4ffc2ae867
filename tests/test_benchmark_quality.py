"""The comparison of supervisions: two rows of two steps, broken off, continued, and told in a table."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from factories import save_tiny_model
from sim_hf.data import write_scenes
from sim_hf.training.arguments import SupervisionArguments, parse_arguments, read_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "scripts" / "configs").glob("quality-*.yaml"))
BENCHMARKS = ROOT / "benchmarks"


def load(name):
    """A benchmark module by its path; under its own name, by which the others import it."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


quality_logs, quality_run = load("quality_logs"), load("quality_run")
quality_table, quality = load("quality_table"), load("quality")

OTHER_SUPERVISIONS = {
    "level_set_image_weight", "level_set_feature_weight", "consistency_weight", "consistency_iterations",
    "tightness_weight", "smoothness_weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Six scenes of 64 pixels and a network of a few thousand weights."""
    folder = tmp_path_factory.mktemp("quality")
    data = write_scenes(folder / "few-scenes", num_train=6, num_val=2, size=64, progress=False)
    model = save_tiny_model(folder / "model")
    training = "--max_steps 2 --batch_size 2 --checkpoint_every 0.5 --pseudo_start 0 --mixed_precision no --log_every 1"
    return ["--data", str(data), "--model", str(model), "--image_size", "64", *training.split()]


def grid(flags, runs, *options):
    return quality.main(["--rows", "boxinst", "sim", *options, "--runs", str(runs), *flags])


def results_of(runs):
    paths = sorted(runs.glob("*/*/seed-*/results.json"))
    return {path.parent.parent.name: json.loads(path.read_text()) for path in paths}


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs") / "quality"
    assert grid(flags, runs) == 0
    AcceleratorState._reset_state(True)
    return runs


def test_a_finished_grid_has_the_numbers_of_every_column(finished):
    results = results_of(finished)
    assert list(results) == ["boxinst", "sim"]
    of_sim_alone = {"pseudo_mask_iou", "prototype_cosine", "prototype_usage"}
    for _, key, _, _ in quality_table.COLUMNS:
        assert key in results["sim"] and (key in results["boxinst"]) == (key not in of_sim_alone), key
    assert 0 < results["sim"]["filled_box_iou"] == results["boxinst"]["filled_box_iou"] < 1
    assert {record["steps"] for record in results.values()} == {2}


def test_rows_begin_with_the_same_weights_and_differ_in_the_supervision_only(finished):
    ours, theirs = results_of(finished).values()
    assert ours["initial_weights"] == theirs["initial_weights"]
    differing = {name for name, value in ours["options"].items() if theirs["options"][name] != value}
    assert differing == {"supervision"}


def test_a_killed_grid_goes_on_to_the_same_numbers(flags, finished, tmp_path, monkeypatch):
    step = quality_run.BoundedTrainer.optimizer_step
    steps_left = [3]  # the first row ends, the second is killed after its first step

    def killed(self, stream):
        if steps_left[0] == 0:
            raise KeyboardInterrupt
        steps_left[0] -= 1
        return step(self, stream)

    monkeypatch.setattr(quality_run.BoundedTrainer, "optimizer_step", killed)
    with pytest.raises(KeyboardInterrupt):
        grid(flags, tmp_path)
    assert list(results_of(tmp_path)) == ["boxinst"]
    first = next(tmp_path.glob("*/boxinst/seed-0/results.json"))
    written = first.stat().st_mtime_ns
    steps_left[0] = 1  # what is left of the second row; the first one takes none
    assert grid(flags, tmp_path) == 0
    assert first.stat().st_mtime_ns == written
    unbroken, continued = (results_of(runs)["sim"] for runs in (finished, tmp_path))
    changing = {"command", "time", "seconds_per_step", "git"}
    assert {k: v for k, v in unbroken.items() if k not in changing} == {k: v for k, v in continued.items() if k not in changing}


def test_two_folders_are_trained_on_together_and_measured_one_by_one(flags, tmp_path, capsys):
    other = write_scenes(tmp_path / "other-scenes", num_train=4, num_val=3, seed=1, size=64, progress=False)
    first, *rest = flags[1:]
    command = ["--rows", "boxinst", "--runs", str(tmp_path / "runs"), "--data", first, first, str(other), *rest]
    assert quality.main(command) == 0
    assert "| validation images of other-scenes | mask AP | AP50 |" in capsys.readouterr().out
    folder = tmp_path / "runs" / "tiny-few-scenes-other-scenes"
    record = json.loads((folder / "boxinst" / "seed-0" / "results.json").read_text())
    assert record["options"]["data"] == [first, first, str(other)]
    assert {"segm/AP", "other-scenes/segm/AP", "other-scenes/bbox/AP"} <= set(record) and "few-scenes/segm/AP" not in record
    info = json.loads((folder / "grid.json").read_text())
    assert info["others"] == ["other-scenes"] and info["generated"] and "(6 + 2 images)" in info["data"]
    assert "--data DATA/few-scenes DATA/few-scenes DATA/other-scenes" in info["command"]


def test_two_folders_of_one_name_are_refused(flags, tmp_path):
    with pytest.raises(SystemExit, match="two folders of --data are named few-scenes"):
        quality.main(["--runs", str(tmp_path), "--data", flags[1], str(tmp_path / "few-scenes")])


def test_when_the_time_is_over_a_run_leaves_a_checkpoint_and_goes_on_later(flags, tmp_path, capsys):
    assert grid(flags, tmp_path, "--minutes", "0") == 0
    assert "the time is over" in capsys.readouterr().out
    assert results_of(tmp_path) == {}
    assert [path.name for path in tmp_path.glob("*/*/seed-0/train/checkpoints/*")] == ["step-00000000"]


def test_a_row_whose_label_model_cannot_be_had_is_skipped_and_says_so(flags, tmp_path, capsys):
    assert quality.main(["--rows", "sam", "--runs", str(tmp_path), *flags]) == 0
    said = capsys.readouterr().out
    assert "sam, seed 0: skipped, facebook/sam2.1-hiera-tiny" in said and "all runs that can be made are finished" in said


def test_a_finished_run_with_other_options_is_refused(flags, finished):
    with pytest.raises(SystemExit, match=r"made with other options \(learning_rate: 0\.0005 then, 0\.001 now\)"):
        grid([*flags, "--learning_rate", "0.001"], finished)


def line_of(page, row):
    return next(line for line in page.read_text().splitlines() if line.startswith(f"| `{row}` |"))


def test_the_page_is_written_from_the_logs_alone_and_keeps_what_others_wrote(finished, tmp_path):
    page = tmp_path / "results.md"
    quality.main(["--table-only", "--runs", str(finished), "--output", str(page)])
    once = page.read_text()
    records = results_of(finished)
    assert "## generated scenes (6 + 2 images), tiny" in once
    for row, record in records.items():
        cells = [cell.strip() for cell in line_of(page, row).split("|")[2:]]
        assert cells[0] == f"{100 * record['segm/AP']:.1f}" and cells[7] == f"{record['matched_mask_iou']:.3f}"
        assert cells[-3:-1] == ["1", "2"]
    assert f"{records['sim']['filled_box_iou']:.3f}" in next(line for line in once.splitlines() if "boxes filled in" in line)
    assert "python benchmarks/quality.py" in once and "DATA/few-scenes" in once and "--model model" in once
    assert "/tmp" not in once and str(finished) not in once
    sheet = Image.open(tmp_path / "results-tiny-few-scenes.jpg")
    assert sheet.width > 3 * quality_table.SHEET_CELL
    page.write_text(once + "\n<!-- other -->\nkept\n<!-- end of other -->\n")
    quality.main(["--table-only", "--runs", str(finished), "--output", str(page)])
    assert page.read_text() == once + "\n<!-- other -->\nkept\n<!-- end of other -->\n"


def test_the_page_is_written_again_where_the_runs_are_gone(finished, tmp_path):
    page, log = tmp_path / "results.md", tmp_path / "results" / "tiny-few-scenes.json"
    quality.main(["--table-only", "--runs", str(finished), "--output", str(page)])
    once, kept = page.read_text(), log.read_text()
    assert "/tmp" not in kept and str(finished) not in kept and "few-scenes" in kept
    page.unlink()
    quality.main(["--table-only", "--runs", str(tmp_path / "nothing"), "--output", str(page)])
    assert page.read_text() == once and log.read_text() == kept


def test_a_grid_gets_rows_and_seeds_to_those_that_were_kept(flags, finished, tmp_path):
    page, log = tmp_path / "results.md", tmp_path / "results" / "tiny-few-scenes.json"
    quality.main(["--table-only", "--runs", str(finished), "--output", str(page)])
    boxinst = line_of(page, "boxinst")
    runs = tmp_path / "runs" / log.stem
    command = ["--rows", "sim", "full", "--seeds", "1", "--output", str(page), *flags]
    options, training = quality.parse(command)
    quality.write_grid(runs, options, options.data, training)
    record = next(run for run in json.loads(log.read_text())["runs"] if run["row"] == "sim")
    for row in ("sim", "full"):
        place = runs / row / "seed-1"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps({**record, "row": row, "seed": 1, "segm/AP": 0.5}))
    quality.main(["--table-only", "--runs", str(runs.parent), "--output", str(page)])
    assert line_of(page, "boxinst") == boxinst
    assert line_of(page, "sim").endswith("| 2 | 2 |") and line_of(page, "full").startswith("| `full` | 50.0 |")
    assert "--rows boxinst sim full --seeds 0 1 --data DATA/few-scenes" in page.read_text()


def test_the_summary_keeps_lines_of_tables_whose_logs_are_gone(tmp_path):
    head = "| validation images | table | seeds, of `full` |"
    gone = ["| old (1 + 1 images) | `b` | `sim` | 3, 3 | 1 |", "| more, of them (1 + 1 images) | `b` | `sim` | 3, 3 | 2 |"]
    page = "\n".join(
        ["<!-- summary -->", head, *gone, "| x (3 + 1 images) | `c` | `sim` | 1, 1 | stale |", "<!-- end of summary -->"]
    )
    records = {row: [{"seed": 0, "segm/AP": ap}] for row, ap in (("boxinst", 0.1), ("sim", 0.2), ("full", 0.4))}
    grids = [quality_logs.Grid(name, {"data": f"{name} (3 + 1 images)"}, records) for name in ("c", "a")]
    lines = quality_table.summary(grids, page).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["a", "b", "b", "c"] and lines[3:5] == gone and "stale" not in lines[5]


def test_pictures_of_photographs_stay_among_the_runs(finished, tmp_path):
    (path,) = finished.glob("*/grid.json")
    info = path.read_text()
    path.write_text(json.dumps({**json.loads(info), "generated": False}))
    try:
        quality.main(["--table-only", "--runs", str(finished), "--output", str(tmp_path / "results.md")])
    finally:
        path.write_text(info)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["results", "results.md"]
    assert (path.parent / "sheet.jpg").exists() and "![" not in (tmp_path / "results.md").read_text()


def test_the_table_gives_mean_and_standard_deviation_over_the_seeds(tmp_path):
    machine = {"gpus": ["A"], "cpu": "B", "cpu_count": 2, "threads": 1}
    base = {"steps": 5, "seconds_per_step": 2.0, "machine": machine, "time": "2026-01-01T00:00:00", "initial_weights": "w"}
    base |= {"git": {"commit": "0123456789abcdef", "dirty": True}, "options": {"max_steps": 5, "alpha": 0.5}}
    for seed, ap in ((0, 0.2), (1, 0.3), (2, 0.4)):
        folder = tmp_path / "grid" / "sim" / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(
            json.dumps({**base, "row": "sim", "seed": seed, "segm/AP": ap, "segm/AP_small": None})
        )
    info = {"rows": ["full", "sim"], "data": "photos (3 + 1 images)", "size": "tiny", "command": "c", "generated": False}
    (tmp_path / "grid" / "grid.json").write_text(json.dumps(info))
    text = quality_table.section(quality_logs.read_grid(tmp_path / "grid"))
    assert "| `sim` | 30.0 ± 10.0 | - |" in text and "`full`" not in text
    assert "* Hardware: A; 2.00 s a step" in text and "`0123456789` with changes" in text
    other = tmp_path / "grid" / "full" / "seed-0"
    other.mkdir(parents=True)
    assert "NOT COMPARABLE" not in text and "but other weights" not in text
    changed = {"initial_weights": "x", "options": {"max_steps": 6, "alpha": 0.7}}
    (other / "results.json").write_text(json.dumps({**base, "row": "full", "seed": 0, "segm/AP": 0.5, **changed}))
    text = quality_table.section(quality_logs.read_grid(tmp_path / "grid"))
    assert "but other weights in" in text and "NOT COMPARABLE: the runs differ in max_steps" in text and "alpha" not in text


def test_the_summary_compares_the_seeds_that_sim_and_boxinst_share(tmp_path):
    def grid_of(**ap):
        records = {row: [{"seed": s, "segm/AP": v, "b/segm/AP": v / 2} for s, v in values.items()] for row, values in ap.items()}
        return quality_logs.Grid("g", {"data": "a (3 + 1 images), b (2 + 1 images)", "others": ["b"]}, records)

    text = quality_table.summary([grid_of(boxinst={0: 0.2, 1: 0.4}, sim={0: 0.3, 1: 0.6, 2: 0.9}, full={1: 0.6})])
    assert "| a (3 + 1 images) | `g` | `sim` | 2, 1 | 30.0 ± 14.1 | 45.0 ± 21.2 | 60.0 | 15.0 ± 7.1 | 75% |" in text
    assert "| b (2 + 1 images) | `g` | `sim` | 2, 1 | 15.0 ± 7.1 | 22.5 ± 10.6 | 30.0 | 7.5 ± 3.5 | 75% |" in text
    both = quality_table.summary([grid_of(boxinst={0: 0.2}, sim={1: 0.3}, full={0: 0.4}, **{"sim-long": {0: 0.3}})])
    assert "| a (3 + 1 images) | `g` | `sim-long` | 1, 1 | 20.0 | 30.0 | 40.0 | 10.0 | 75% |" in both and "`sim`" not in both
    commas = quality_logs.Grid(
        "g", {"data": "a, b (3 + 1 images)"}, grid_of(boxinst={0: 0.2}, sim={0: 0.3}, full={0: 0.4}).records
    )
    assert "| a, b (3 + 1 images) | `g` | `sim` | 1, 1 |" in quality_table.summary([commas])
    without_full, without_boxinst = grid_of(boxinst={0: 0.2}, sim={0: 0.3}), grid_of(boxinst={}, sim={0: 0.2}, full={1: 0.1})
    assert quality_table.summary([without_full, without_boxinst]) == ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_of_the_comparison_is_read_as_options(path, tmp_path):
    options = read_config(path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**options, "data": ["somewhere"]}))
    parse_arguments(["--config", str(config)])
    if path.stem.startswith("quality-size-"):
        assert options.get("matching", "no matching") == ("no matching" if "condinst" in path.stem else "projections")
    else:
        assert set(options) <= quality_run.ROW_OPTIONS and "supervision" in options


def test_a_row_that_changes_more_than_the_supervision_is_refused(tmp_path, monkeypatch):
    for name, text in (("quality-longer", "supervision: sim\nmax_steps: 9\n"), ("quality-size-tiny", "max_steps: 3\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(quality_run, "CONFIGS", tmp_path)
    with pytest.raises(ValueError, match="may only change the supervision, not max_steps"):
        quality_run.make_run("longer", 0, size="tiny", data=[tmp_path], folder=tmp_path)


def test_sim_paper_states_every_number_so_that_new_defaults_cannot_change_it():
    """Whoever adds an option of `sim`: write into quality-sim-paper.yaml the value that stands for the paper."""
    options = {field.name for field in dataclasses.fields(SupervisionArguments)} - OTHER_SUPERVISIONS
    of_the_size = {"matching", "pairwise_dilation", "color_threshold"}
    stated = set(read_config(ROOT / "scripts" / "configs" / "quality-sim-paper.yaml"))
    assert options - of_the_size - stated == set()


@pytest.mark.e2e
def test_runs_at_a_time_give_the_numbers_of_one_after_the_other(flags, finished, tmp_path):
    assert grid(flags, tmp_path, "--jobs", "2") == 0
    changing = {"command", "time", "seconds_per_step", "git"}
    for row, record in results_of(finished).items():
        other = results_of(tmp_path)[row]
        assert {k: v for k, v in record.items() if k not in changing} == {k: v for k, v in other.items() if k not in changing}
    assert len(list(tmp_path.glob("*/*/seed-0/log.txt"))) == 2
