"""The model card of a run of `transformers.Trainer`, from what the Trainer knows."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import Trainer

from sim_hf.evaluation.prediction import names_of
from sim_hf.evaluation.results import git_state, machine, package_versions, typed_command
from sim_hf.hub.card_check import check_model_card
from sim_hf.hub.model_card import write_model_card
from sim_hf.hub.run_facts import (
    NUM_AVERAGED,
    DataFacts,
    RunFacts,
    averaged_diagnostics,
    commit_text,
    machine_text,
    shareable_command,
)
from sim_hf.models.architectures import ARCHITECTURES

_HUB_SOURCE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@")
_MEASURED = re.compile(r"eval_(?:\w+_)?((?:segm|bbox)/\w+)")


def facts_of_trainer(trainer: Trainer, rows: Any, eval_rows: Any, *, supervision: str, used_masks: bool) -> RunFacts:
    """Data, schedule, results and diagnostics of a training that is at its end, or in its middle. rows, eval_rows: the data sets
    in the detection convention."""
    args, state = trainer.args, trainer.state
    metrics, step = _measured(state)
    return RunFacts(
        supervision=supervision,
        used_masks=used_masks,
        train=[data_facts(rows, "the training images")],
        evaluated_on=data_facts(eval_rows, "the validation images") if metrics and eval_rows is not None else None,
        schedule={
            "steps": f"{state.global_step} of {state.max_steps}",
            "images a step": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
            "optimiser": f"{getattr(args.optim, 'value', args.optim)}, learning rate {args.learning_rate:g}, "
            f"weight decay {args.weight_decay:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
            "seed": str(args.seed),
        },
        metrics=metrics,
        note=f"Measured at step {step}." if metrics and step != state.global_step else None,
        diagnostics=averaged_diagnostics([line for line in state.log_history if "fill" in line][-NUM_AVERAGED:]),
        command=shareable_command(typed_command(sys.argv, sys.orig_argv)),
        commit=commit_text(git_state()),
        versions=package_versions(),
        machine=machine_text(machine()),
    )


def _measured(state: Any) -> tuple[dict[str, float], int | None]:
    """(COCO numbers, their step): of the best checkpoint where that one was loaded, else the last."""
    lines = [line for line in state.log_history if any(_MEASURED.fullmatch(name) for name in line)]
    best = [line for line in lines if state.best_model_checkpoint and line["step"] == state.best_global_step]
    if not lines:
        return {}, None
    line = (best or lines)[-1]
    return {match[1]: value for name, value in line.items() if (match := _MEASURED.fullmatch(name))}, line["step"]


def data_facts(rows: Any, name: str) -> DataFacts:
    """Counts of a data set, and its place on the Hub when it came from there."""
    if isinstance(rows, dict):
        rows = next(iter(rows.values()), None)
    if not isinstance(rows, Dataset) or "objects" not in rows.features:
        return DataFacts(name)
    sources = {match[1] for source in rows.info.download_checksums or {} if (match := _HUB_SOURCE.match(source))}
    hub_id = sources.pop() if len(sources) == 1 else None
    objects: Any = rows.select_columns(["objects"])
    return DataFacts(hub_id or name, hub_id, len(rows), sum(len(row["objects"]["bbox"]) for row in objects))


def card_of_trainer(
    model: Any,
    repo_id: str,
    facts: RunFacts,
    *,
    picture: str | None = None,
    picture_text: str = "",
    language: str | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
) -> ModelCard:
    """The card, with what `Trainer.create_model_card` can be told."""
    names, ids = _listed(dataset), _listed(dataset_tags)
    if names or ids:
        facts.train = [
            DataFacts(name, hub_id, *((facts.train[0].images, facts.train[0].instances) if number == 0 else ()))
            for number, (name, hub_id) in enumerate(zip(names or ids, ids or [None] * len(names), strict=True))
        ]
    if finetuned_from:
        facts.start = facts.base_model = finetuned_from
    card = write_model_card(
        repo_id,
        facts,
        architecture=ARCHITECTURES[model.config.model_type].title,
        classes=[name for _, name in sorted(names_of(model).items())],
        num_parameters=model.num_parameters(),
        license=license or "unknown",
        picture=picture,
        picture_text=picture_text,
        tags=[*_listed(tags), *_listed(tasks), *_listed(dataset_args)],
    )
    if language:
        card.data.language = language
    if model_name:
        card.text = card.text.replace(f"# {repo_id.rpartition('/')[2]}:", f"# {model_name}:", 1)
    check_model_card(str(card))
    return card


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
