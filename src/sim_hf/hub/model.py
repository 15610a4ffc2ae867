"""Push a model with its card: `push_model`, what `sim-hf push` does."""

from __future__ import annotations

import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard, errors
from transformers.pipelines import PIPELINE_REGISTRY

from sim_hf.evaluation.prediction import names_of
from sim_hf.hub.allowed_files import CARD, CODE_FILES, MODEL_FILES, PICTURES, WEIGHTS, allowed_in
from sim_hf.hub.card_check import check_model_card
from sim_hf.hub.card_picture import SCENES_TEXT, SHEET_TEXT, run_sheet, scenes_picture
from sim_hf.hub.model_card import write_model_card
from sim_hf.hub.repository import HubRepository
from sim_hf.hub.run_facts import RunFacts, facts_of_run
from sim_hf.models.architectures import InstanceSegmenter, architecture_of, load_model
from sim_hf.models.sim import SIMImageProcessor

logger = logging.getLogger(__name__)
TASK = "instance-segmentation"  # its pipeline, which the package registers, goes along with the code
PICTURE = "pictures/instances.jpg"
REPLACED = re.compile(f"{WEIGHTS.pattern}|{PICTURES.pattern}|{CODE_FILES.pattern}")  # of an earlier push


@dataclass(frozen=True)
class ModelFolder:
    """A folder for `from_pretrained`, and the run that left it, when it lies in one."""

    model: Path
    run: Path | None


def find_model(source: str | Path) -> ModelFolder:
    """`source` is a model folder or the `--output_dir` of a run; FileNotFoundError saying what is missing."""
    folder = Path(source)
    model = folder if (folder / "config.json").is_file() else folder / "model"
    missing = [name for name in ("config.json", "preprocessor_config.json") if not (model / name).is_file()]
    if missing or not any(WEIGHTS.fullmatch(path.name) for path in model.iterdir()):
        what = " and ".join(missing) or "model.safetensors"
        raise FileNotFoundError(f"{folder}: neither a model nor a run with one in model/; {model / what} is missing")
    run = model.parent if model.parent == folder or (model.parent / "checkpoints").is_dir() else None
    return ModelFolder(model, run)


def push_model(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    with_code: bool = False,
    license: str | None = None,
    card_pictures: bool = False,
    message: str = "Upload model",
    token: str | None = None,
) -> CommitInfo:
    """Weights, configuration, processor and card of a model or a run, in one commit of `repo_id` (made if it is not there).

    The model is loaded first: what does not load is not pushed. A README.md that lies in the model's folder is its card; without
    one the card is written from the run. license: of the weights (default: that of the model the run started from, else
    "unknown"). card_pictures: show the run's sheet of validation images, which may be other people's photographs; without it
    the card shows generated ones, if the model knows their classes. with_code: for people who have only transformers.
    """
    found = find_model(source)
    model = load_model(found.model, dtype="auto")
    processor = SIMImageProcessor.from_pretrained(found.model)
    own_card = found.model / CARD
    if own_card.is_file():
        check_model_card(own_card.read_text(encoding="utf-8"))
    repository = HubRepository(repo_id, private=private, revision=revision, token=token)
    with tempfile.TemporaryDirectory() as staging:
        files: dict[str, Path | bytes] = dict(allowed_in(found.model, MODEL_FILES))
        if with_code:
            save_with_code = architecture_of(found.model).save_with_code
            save_with_code(staging, model, processor, pipelines={TASK: PIPELINE_REGISTRY.supported_tasks[TASK]["impl"]})
            files = dict(allowed_in(staging, re.compile(f"{MODEL_FILES.pattern}|{CODE_FILES.pattern}")))
        if own_card.is_file():
            files |= {CARD: own_card, **allowed_in(found.model, PICTURES)}
        else:
            files |= _written_card(repo_id, found, model, processor, license, with_code, card_pictures)
        return repository.commit(files, message, replaces=REPLACED)


def _written_card(
    repo_id: str,
    found: ModelFolder,
    model: InstanceSegmenter,
    processor: SIMImageProcessor,
    license: str | None,
    with_code: bool,
    card_pictures: bool,
) -> dict[str, Path | bytes]:
    facts = facts_of_run(found.run) if found.run else RunFacts()
    if found.run and found.model.name == "best":
        facts.metrics = {}  # results.json is of the last evaluation
    picture = run_sheet(found.run) if card_pictures and found.run else None
    text = SHEET_TEXT if picture else SCENES_TEXT
    picture = picture or scenes_picture(model, processor)
    license = license or facts.license or _license_on_the_hub(facts.base_model)
    if license is None:
        logger.warning("the card says that the licence is unknown, so others may not use the model: give one with --license")
    card = write_model_card(
        repo_id,
        facts,
        architecture=architecture_of(found.model).title,
        classes=[name for _, name in sorted(names_of(model).items())],
        num_parameters=model.num_parameters(),
        license=license or "unknown",
        with_code=with_code,
        picture=PICTURE if picture else None,
        picture_text=text,
    )
    check_model_card(str(card))
    return {CARD: str(card).encode(), **({PICTURE: picture} if picture else {})}


def _license_on_the_hub(base_model: str | None) -> str | None:
    """Of the model that the run started from; None when it cannot be asked."""
    if base_model is None:
        return None
    try:
        return ModelCard.load(base_model, ignore_metadata_errors=True).data.license
    except (errors.HTTPError, OSError, ValueError, errors.EntryNotFoundError):
        return None
