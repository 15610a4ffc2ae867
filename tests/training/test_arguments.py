"""The command line: flags over the file over the defaults, and nothing silently ignored."""

import dataclasses

import pytest

from sim_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    SupervisionArguments,
    parse_arguments,
    read_config,
    steps_of,
)

DATA = ["--data", "somewhere"]


def test_defaults_are_the_papers():
    _, _, supervision, run = parse_arguments(DATA)
    assert (supervision.supervision, supervision.num_prototypes, supervision.prototype_momentum) == ("sim", 10, 0.999)
    assert (supervision.projection_weight, supervision.pairwise_weight, supervision.mu) == (5.0, 2.0, 5.0)
    assert run.export == "teacher"


def test_a_config_file_replaces_defaults_and_flags_replace_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("supervision: boxinst\nmax_steps: 7\nseed: 3\ndata: [a, b]\n")
    _, data, supervision, run = parse_arguments(["--config", str(config), "--max_steps", "9"])
    assert supervision.supervision == "boxinst"
    assert (run.max_steps, run.seed) == (9, 3)
    assert data.data == ["a", "b"]
    assert run.batch_size == RunArguments().batch_size
    _, data, _, _ = parse_arguments(["--config", str(config), "--data", "c"])
    assert data.data == ["c"]


def test_an_empty_config_file_changes_nothing(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("# nothing\n")
    assert parse_arguments(["--config", str(config), *DATA]) == parse_arguments(DATA)


def test_an_unknown_key_of_a_config_file_is_named(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("max_step: 7\nseeed: 1\nseed: 3\n")
    with pytest.raises(ValueError, match=r"run\.yaml: unknown option\(s\) max_step, seeed"):
        parse_arguments(["--config", str(config), *DATA])


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "a: [1\n"])
def test_a_config_file_that_is_no_mapping_is_refused(text, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        read_config(config)


def test_a_config_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        parse_arguments(["--config", str(tmp_path / "nothing.yaml"), *DATA])


@pytest.mark.parametrize(("text", "name"), [("max_steps: many\n", "max_steps"), ("learning_rate: fast\n", "learning_rate")])
def test_a_value_of_the_wrong_kind_in_a_config_file_is_named(text, name, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--config", str(config), *DATA])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert f"--{name}" in message and "invalid" in message


def test_numbers_in_a_config_file_may_be_written_as_in_yaml_1_2(tmp_path):
    """YAML 1.1 reads 5e-4 as text."""
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 5e-4\nscale_min: 1\n")
    _, data, _, run = parse_arguments(["--config", str(config), *DATA])
    assert run.learning_rate == 5e-4 and isinstance(run.learning_rate, float)
    assert data.scale_min == 1.0


def test_an_unknown_flag_is_named():
    with pytest.raises(ValueError, match="max_stepz"):
        parse_arguments([*DATA, "--max_stepz", "3"])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for group in (ModelArguments, DataArguments, SupervisionArguments, RunArguments):
        for field in dataclasses.fields(group):
            assert f"--{field.name}" in text
            assert field.metadata["help"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "exactly one of --data"),
        ([*DATA, "--dataset", "x"], "exactly one of --data"),
        (["--train_annotations", "a.json"], "needs --train_images"),
        (["--train_annotations", "a.json", "--train_images", "i", "--val_annotations", "v.json"], "needs --val_images"),
        ([*DATA, "--supervision", "boxes"], "full, boxinst, level_set, bbtp, sim, got 'boxes'"),
        ([*DATA, "--matching", "masks"], "own, projections, boxes, got 'masks'"),
        ([*DATA, "--batch_size", "4", "--gradient_accumulation_steps", "3"], r"\(3\) must divide --batch_size \(4\)"),
        ([*DATA, "--gradient_accumulation_steps", "0"], "must divide"),
        ([*DATA, "--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        ([*DATA, "--export", "both"], "--export must be teacher or student"),
        ([*DATA, "--optimizer", "adam"], "--optimizer must be one of adamw, sgd, got 'adam'"),
        ([*DATA, "--lr_schedule", "steps"], "--lr_schedule must be one of cosine, poly, constant, step, got 'steps'"),
        ([*DATA, "--mixed_precision", "fp8"], "--mixed_precision must be"),
    ],
)
def test_contradictions_and_impossible_values_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(flags)


def test_no_option_has_two_homes():
    names = [
        f.name for group in (ModelArguments, DataArguments, SupervisionArguments, RunArguments) for f in dataclasses.fields(group)
    ]
    assert len(names) == len(set(names))


def test_lengths_are_steps_or_fractions_of_the_run():
    assert steps_of(0.25, 1000) == 250
    assert steps_of(1 / 9, 90_000) == 10_000
    assert steps_of(0, 1000) == 0
    assert steps_of(1.0, 1000) == 1000
    assert steps_of(500, 1000) == 500
    with pytest.raises(ValueError, match="negative"):
        steps_of(-0.5, 1000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_steps: 1.5", "max_steps must be of type int, got 1.5"),
        ("max_steps: true", "max_steps must be of type int, got True"),
        ("use_masks: 1", "use_masks must be of type bool, got 1"),
        ("learning_rate: [1.0]", r"learning_rate must be of type float, got \[1.0\]"),
        ("data: photographs", r"data must be of type list.*, got 'photographs'"),
        ("lr_steps: [0.5, late]", r"lr_steps must be of type list.*, got \[0.5, 'late'\]"),
        ("lr_steps: [true]", r"lr_steps must be of type list.*, got \[True\]"),
        ("seed:", "seed must be of type int, got None"),
    ],
)
def test_a_config_value_of_another_type_is_refused_by_name(tmp_path, line, message):
    config = tmp_path / "run.yaml"
    config.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_config(config)


def test_a_list_of_numbers_may_hold_whole_ones(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("lr_schedule: step\nlr_steps: [60, 0.75]\n")
    assert parse_arguments(["--config", str(config), *DATA])[3].lr_steps == [60, 0.75]
    assert parse_arguments(["--config", str(config), *DATA, "--lr_steps", "0.5", "70"])[3].lr_steps == [0.5, 70.0]


def test_config_values_that_fit_are_taken(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("max_steps: 5\nlearning_rate: 1\nmodel:\nnum_threads: 2\ndata: [a, b]\nfreeze_batch_norm: false\n")
    assert read_config(config)["data"] == ["a", "b"]
