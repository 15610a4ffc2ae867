"""What a model card says of a run, gathered from the folder that the run left.

`results.json` holds the last evaluation with command, commit and versions, the newest checkpoint's manifest the options, and
`metrics.jsonl` the diagnostics. A run that lacks one of them gives a card that says less.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import orjson
from huggingface_hub import ModelCard, constants
from huggingface_hub.file_download import repo_folder_name

DIAGNOSTICS = ("fill", "corners", "centre", "leak", "shape_similarity")
NUM_AVERAGED = 10  # lines of metrics.jsonl: one is a few images only
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOKEN = re.compile(r"hf_\w{8,}")


@dataclass(frozen=True)
class DataFacts:
    """A data set, without its place on this machine. hub_id: where it is, when it came from the Hub."""

    name: str
    hub_id: str | None = None
    images: int | None = None
    instances: int | None = None


@dataclass
class RunFacts:
    """None and empty mean: not known, and the card does not mention it."""

    supervision: str | None = None
    used_masks: bool = False
    train: list[DataFacts] = field(default_factory=list)
    evaluated_on: DataFacts | None = None
    start: str | None = None  # the model or backbone weights the run began with
    base_model: str | None = None  # the same, when it is a repository of the Hub
    license: str | None = None  # of the model that the run began with, as its card has it
    schedule: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # segm/AP ...: 0 to 1
    note: str | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)
    command: str | None = None
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: str | None = None


def facts_of_run(folder: Path) -> RunFacts:
    """The facts of an `--output_dir` of `sim-hf train`."""
    results, manifest = _json(folder / "results.json"), _newest_manifest(folder / "checkpoints")
    options = manifest.get("identity", {})
    facts = RunFacts(
        supervision=options.get("supervision") or results.get("supervision"),
        used_masks=options.get("supervision") == "full" or bool(options.get("use_masks")),
        train=_train_data(options),
        evaluated_on=_evaluation_data(options) if results else None,
        diagnostics=_diagnostics(folder / "metrics.jsonl"),
        versions=manifest.get("versions", {}),
    )
    _add_start(facts, options)
    _add_results(facts, results)
    facts.schedule = _schedule(options, manifest)
    return facts


def _add_results(facts: RunFacts, results: Mapping[str, Any]) -> None:
    facts.metrics = {name: value for name, value in results.items() if name.startswith(("segm/", "bbox/")) and value is not None}
    facts.note = results.get("note")
    facts.command = shareable_command(results["command"]) if results.get("command") else None
    facts.commit = commit_text(results.get("git", {}))
    facts.versions = results.get("versions", facts.versions)
    facts.machine = machine_text(results.get("machine", {}))


def commit_text(git: Mapping[str, Any]) -> str | None:
    commit = git.get("commit")
    return None if commit in (None, "unknown") else f"{commit}{' with changes' if git.get('dirty') else ''}"


def machine_text(machine: Mapping[str, Any]) -> str | None:
    if not machine:
        return None
    gpus: Sequence[str] = machine.get("gpus") or []
    return ", ".join(gpus) if gpus else f"{machine.get('cpu')}, {machine.get('threads')} of {machine.get('cpu_count')} threads"


def shareable_command(command: str) -> str:
    """The command without what it tells about this machine: of paths outside of the working folder only the last name stays, and
    nothing that looks like a token."""
    return shlex.join(_shareable(part) for part in shlex.split(command))


def _shareable(part: str) -> str:
    option, equals, value = part.partition("=") if part.startswith("-") else ("", "", part)
    if value.startswith(("/", "~", "..")):
        value = PurePath(value).name
    return option + equals + _TOKEN.sub("***", value)


def _add_start(facts: RunFacts, options: Mapping[str, Any]) -> None:
    model, backbone = options.get("model"), options.get("backbone_weights")
    source = model or backbone
    if source is None:
        facts.start = "random weights" if options else None
    elif not Path(source).exists() and _came_from_the_hub(source):
        facts.start, facts.base_model = source, source
    else:
        facts.start = _local_name(source)
        facts.license = _license_of(Path(source) / "README.md")
    if source is not None and model is None:
        facts.start = f"the backbone {facts.start}, everything else random"


def _local_name(path: str) -> str:
    """The last name of a path; of the folders that every run has, the run's name too."""
    parts = PurePath(path).parts
    return "/".join(parts[-2:]) if parts[-1] in ("model", "best") else parts[-1]


def _license_of(card: Path) -> str | None:
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except (OSError, ValueError):
        return None


def _came_from_the_hub(name: str) -> bool:
    """It is in the cache: a name alone could also be that of a folder which is gone."""
    folder = repo_folder_name(repo_id=name, repo_type="model") if _HUB_ID.fullmatch(name) else ""
    return bool(folder) and (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def _train_data(options: Mapping[str, Any]) -> list[DataFacts]:
    if options.get("dataset"):
        return [_hub_data(options["dataset"], options.get("train_split"))]
    if options.get("train_annotations"):
        return [coco_facts(Path(options["train_annotations"]))]
    folders = dict.fromkeys(options.get("data") or [])  # a folder that is named twice is seen twice as often
    return [coco_facts(Path(folder) / "instances_train.json", PurePath(folder).name) for folder in folders]


def _evaluation_data(options: Mapping[str, Any]) -> DataFacts | None:
    if options.get("dataset"):
        return _hub_data(options["dataset"], options.get("val_split"))
    if options.get("val_annotations"):
        return coco_facts(Path(options["val_annotations"]))
    folders = options.get("data") or []
    return coco_facts(Path(folders[0]) / "instances_val.json", PurePath(folders[0]).name) if folders else None


def _hub_data(dataset: str, split: str | None) -> DataFacts:
    is_local = Path(dataset).exists()
    name = PurePath(dataset).name if is_local else dataset
    return DataFacts(f"{name}, {split}" if split else name, None if is_local else dataset)


def coco_facts(annotations: Path, name: str | None = None) -> DataFacts:
    """Counts of a COCO file, crowds left out; none when the file is not there any more."""
    name = name or annotations.stem
    try:
        document = orjson.loads(annotations.read_bytes())
        instances = sum(not annotation.get("iscrowd") for annotation in document["annotations"])
        return DataFacts(name, None, len(document["images"]), instances)
    except (OSError, ValueError, KeyError, TypeError):
        return DataFacts(name)


def _schedule(options: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    if not options:
        return {}
    processes = manifest.get("world_size", 1)
    optimizer = {"adamw": "AdamW", "sgd": "SGD"}[options.get("optimizer", "adamw")]
    return {
        "steps": f"{manifest.get('step')} of {options['max_steps']}",
        "images a step": f"{options['batch_size'] * processes}",
        "optimiser": f"{optimizer}, learning rate {options['learning_rate']:g}, "
        f"backbone x {options['backbone_lr_multiplier']:g}, weight decay {options['weight_decay']:g}, {options['lr_schedule']}",
        "precision": str(options["mixed_precision"]),
        "seed": str(options["seed"]),
    }


def _diagnostics(file: Path) -> dict[str, float]:
    """Means over the last lines that have any."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if '"fill"' in line][-NUM_AVERAGED:]
    except (OSError, ValueError):
        return {}
    return averaged_diagnostics(lines)


def averaged_diagnostics(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    values = {name: [line[name] for line in lines if name in line] for name in DIAGNOSTICS}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def _newest_manifest(checkpoints: Path) -> dict[str, Any]:
    manifests = sorted(checkpoints.glob("step-*/manifest.json"), key=lambda path: path.parent.name)
    return _json(manifests[-1]).get("metadata", {}) if manifests else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
