"""Push the folder of a Space: its program, its requirements and its card, in one commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitInfo, SpaceCard

from sim_hf.hub.allowed_files import CARD, SPACE_FILES, allowed_in
from sim_hf.hub.errors import hub_errors
from sim_hf.hub.repository import HubRepository

MODEL_VARIABLE = "SIM_MODEL"


def push_space(
    folder: str | Path,
    repo_id: str,
    *,
    model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload Space",
    token: str | None = None,
) -> CommitInfo:
    """The program of `folder` (text files only; no pictures, weights or data). model: the Hub id that the Space shall load, set
    as its variable SIM_MODEL."""
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"{folder}: a Space has a {CARD} with its settings (sdk, app_file)")
    settings = SpaceCard.load(folder / CARD).data
    program = settings.get("app_file") or "app.py"
    if not settings.get("sdk"):
        raise ValueError(f"{folder / CARD}: its metadata does not say which sdk the Space uses")
    if settings.get("sdk") != "docker" and not (folder / program).is_file():
        raise FileNotFoundError(f"{folder / program}: the {CARD} names it as the Space's program, but it is not there")
    repository = HubRepository(repo_id, "space", private=private, revision=revision, token=token, space_sdk=settings.get("sdk"))
    if model is not None:  # before the commit, which starts the Space
        with hub_errors(repo_id, token):
            repository.api.add_space_variable(repo_id, MODEL_VARIABLE, model)
    return repository.commit(allowed_in(folder, SPACE_FILES), message, replaces=SPACE_FILES)
