"""What went wrong with the Hub, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors, get_token


class HubError(RuntimeError):
    """A push or download that did not work; the message says why and what helps."""


# RuntimeError: "Error while uploading ...", which the client makes of what went wrong with a large file.
CLIENT_ERRORS = (errors.HTTPError, ConnectionError, errors.LocalTokenNotFoundError, RuntimeError)


@contextmanager
def hub_errors(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Turns the errors of the client library into a `HubError`."""
    try:
        yield
    except HubError:
        raise
    except CLIENT_ERRORS as error:
        raise HubError(explain(error, repo_id, token)) from error


def require_token(token: str | None = None) -> None:
    """Pushing needs a token: say so before the work and not after it."""
    if not (token or get_token()):
        raise HubError(
            f"no access token for {constants.ENDPOINT}: run `hf auth login`, or set HF_TOKEN to a token that may write "
            f"(make one at {constants.ENDPOINT}/settings/tokens)"
        )


def explain(error: Exception, repo_id: str, token: str | None = None) -> str:
    """One line for a person."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo_id} cannot be reached, HF_HUB_OFFLINE is set: unset it"
    if not isinstance(error, errors.HTTPError | ConnectionError):
        return f"{repo_id}: {error}"
    if not isinstance(error, errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached: {type(error).__name__}: {error}".rstrip(": ")
    status = error.response.status_code
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError) and (token or get_token()):
        return f"there is no repository {repo_id}, or it is private and this token may not see it"
    if status == 401:
        if not (token or get_token()):
            return f"{repo_id} needs an access token: run `hf auth login` or set HF_TOKEN"
        return f"{constants.ENDPOINT} does not know this access token (401): run `hf auth login` again, or correct HF_TOKEN"
    if status == 403:
        return f"this access token may not write to {repo_id} (403): it needs write permission, and {repo_id} must be yours"
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else at the same time ({status}): push again"
    return f"{repo_id}: the Hub answered {status}: {error.server_message or error}"
