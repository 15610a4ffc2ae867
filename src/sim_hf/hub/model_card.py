"""The model card: what a run did and measured, as a README with metadata that the Hub understands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sim_hf.evaluation.results import TABLE_ROWS
from sim_hf.hub.run_facts import RunFacts

TEMPLATE = Path(__file__).with_name("model_card.md")
TASK = "image-segmentation"
METRIC = "mean_average_precision"
TAGS = ("instance-segmentation", "sim")
INDEXED = {"segm/AP": "mask AP", "segm/AP50": "mask AP50", "segm/AP75": "mask AP75", "bbox/AP": "box AP", "bbox/AP50": "box AP50"}
MEANINGS = {
    "fill": "share of its box that a mask covers; 0.4 to 0.7 is healthy, 1 would be filled boxes",
    "corners": "share of the box's corners that it covers; low is healthy",
    "centre": "share of the box's middle that it covers; high is healthy",
    "leak": "share of the mask outside of the box",
    "shape_similarity": "overlap of two masks stretched to one size; 1 would be one shape for all",
}


def write_model_card(
    repo_id: str,
    facts: RunFacts,
    *,
    architecture: str,
    classes: Sequence[str],
    num_parameters: int,
    license: str = "unknown",
    with_code: bool = False,
    picture: str | None = None,
    picture_text: str = "",
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of the model in `repo_id`. architecture: its title. license: an identifier of the Hub ("apache-2.0",
    "cc-by-nc-4.0", "other", ...). picture: its path in the repository."""
    name = repo_id.rpartition("/")[2]
    boxes_only = facts.supervision is not None and not facts.used_masks
    data = ModelCardData(
        license=license,
        library_name="transformers" if with_code else "sim_hf",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys([*TAGS, architecture.lower(), *(["box-supervised"] if boxes_only else []), *tags])),
        datasets=list(dict.fromkeys(data.hub_id for data in facts.train if data.hub_id)) or None,
        base_model=facts.base_model,
        metrics=[METRIC] if facts.metrics else None,
        model_name=name,
        eval_results=_eval_results(facts) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        facts=facts,
        architecture=architecture,
        classes=[_plain(text) for text in classes],
        millions=num_parameters / 1e6,
        with_code=with_code,
        picture=picture,
        picture_text=picture_text,
        table=_table(facts),
        diagnostics=[(name, f"{value:.2f}", MEANINGS[name]) for name, value in facts.diagnostics.items()],
        licence_text=_licence_text(license),
    )


def _eval_results(facts: RunFacts) -> list[EvalResult]:
    on = facts.evaluated_on
    name = on.name if on else "validation images"
    return [
        EvalResult(
            task_type=TASK,
            task_name="Instance segmentation",
            dataset_type=(on.hub_id if on else None) or "coco-format",
            dataset_name=name,
            metric_type=METRIC,
            metric_name=label,
            metric_value=round(facts.metrics[key], 5),
        )
        for key, label in INDEXED.items()
        if key in facts.metrics
    ]


def _table(facts: RunFacts) -> list[tuple[str, str, str]]:
    def cell(key: str) -> str:
        return f"{facts.metrics[key]:.3f}" if key in facts.metrics else "n/a"

    recalls = [key.removeprefix("segm/") for key in facts.metrics if key.startswith("segm/AR")]
    return [(row, cell(f"segm/{row}"), cell(f"bbox/{row}")) for row in (*TABLE_ROWS, *recalls)]


def _licence_text(license: str) -> str:
    if license == "unknown":
        return "Of these weights: not stated. Ask the author before using them."
    return f"Of these weights: `{license}`. The licences of the training data hold besides."


def _plain(text: str) -> str:
    """A class name that stays text in Markdown, whatever a data set calls its classes."""
    text = " ".join(text.split())
    for sign in "\\`*_{}[]<>|#!":
        text = text.replace(sign, f"\\{sign}")
    return text
