"""The parts of the benchmarks that are for a GPU, as far as a CPU can go through them: small cases, no clock is judged."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture
def small_case(benchmark, monkeypatch):
    """A case "small" that another device than "cpu" (by its name) goes through."""
    speed_step = benchmark("speed_step")
    case = speed_step.Case("tiny", 64, 2, bf16=False, goal=1.0)
    monkeypatch.setitem(speed_step.CASES, "small", case)
    monkeypatch.setitem(benchmark("measuring").WARM_UPS, "cpu:0", 1)
    return case


def test_the_step_row_of_another_device_says_what_the_teacher_takes_and_the_ratio_to_full_supervision(benchmark, small_case):
    row = benchmark("speed_step").step_row("small", 1, "cpu:0")
    assert row.equal
    for words in ("SIM adds", "the teacher's forward is", "SIM/full ratio"):
        assert words in row.note


def test_a_profile_names_ten_operators_and_the_largest_batch(benchmark, small_case, tmp_path, monkeypatch, capsys):
    profile_step, output = benchmark("profile_step"), tmp_path / "profile.json"
    arguments = ["--case", "small", "--steps", "1", "--largest", "--most", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *arguments])
    profile_step.main()
    record = json.loads(output.read_text())
    assert len(record["kernels"]) == 10 and record["largest_batch"] == 2 and record["waits"] == {}
    shares = [kernel["share"] for kernel in record["kernels"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert "aten::" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (1, 1), (5, 5), (16, 16), (100, 96), (999, 64)])
def test_the_largest_batch_is_found_to_an_eighth(limit, found, benchmark):
    most = 64 if limit == 999 else 512
    assert benchmark("profile_step").largest(lambda count: count <= limit, 16, most) == found


def test_a_batch_that_does_not_fit_is_not_the_end(benchmark, small_case, monkeypatch):
    profile_step = benchmark("profile_step")

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark("speed_step").SimStep, "run", full)
    batch = benchmark("speed_step")._scenes("tiny", 64, 2)[1]
    assert not profile_step.batch_fits(small_case, batch, 2)


def test_a_row_that_fails_on_a_gpu_is_reported_and_on_a_cpu_raised(benchmark, monkeypatch):
    speed = benchmark("speed")

    def fail(settings):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setitem(speed.ROWS, "growth", fail)
    monkeypatch.setitem(speed.GPU_ROWS, "growth", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert speed.measured("growth", speed.Settings(1, None, "cuda")) == ([], "OutOfMemoryError: CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        speed.measured("growth", speed.Settings(1, None))


def test_all_forms_of_deformable_attention_agree_and_the_fastest_is_named(benchmark):
    deformable = benchmark("deformable_attention")
    case = deformable.Case("small", 64, 1, 2)
    forms = {name: form for name, form in deformable.FORMS.items() if name != "triton"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformable, "FORMS", forms)
        lines = [line for dtype in (torch.float32, torch.bfloat16) for line in deformable.lines_of(case, dtype, "cpu", 1, [])]
    assert [(line.form, line.equal) for line in lines] == [("grid_sample", True), ("bags", True)] * 2
    assert deformable.verdict(lines).count("small") == 2 and deformable.table(lines).count("\n") == 4
