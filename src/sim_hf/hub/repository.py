"""A repository of the Hub, and the one way this package changes it: a single commit on a known parent.

Weights, configuration, processor, code and card arrive together or not at all; what they replace goes in the same commit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants

import sim_hf
from sim_hf.hub.allowed_files import refuse_secrets
from sim_hf.hub.errors import CLIENT_ERRORS, HubError, explain, hub_errors, require_token

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class HubRepository:
    """Created if it is not there. kind: "model", "dataset" or "space". revision: the branch to push to, made from the main one
    if it is not there. private=True refuses a repository that is public already. Raises `HubError`."""

    def __init__(
        self,
        repo_id: str,
        kind: str = "model",
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        space_sdk: str | None = None,
    ) -> None:
        if not _NAME.fullmatch(repo_id):
            raise ValueError(f"a repository is called owner/name, got {repo_id!r}")
        require_token(token)
        self.repo_id, self.kind, self.token = repo_id, kind, token
        self.branch = revision or constants.DEFAULT_REVISION
        self.api = HfApi(token=token, library_name="sim_hf", library_version=sim_hf.__version__)
        self._uploaded: dict[str, CommitOperationAdd] = {}
        with hub_errors(repo_id, token):
            self.api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, space_sdk=space_sdk)
            if private and not self.api.repo_info(repo_id, repo_type=kind).private:
                raise HubError(f"{repo_id} is there already and public; make it private in its settings, or choose another name")
            if revision is not None:
                self.api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)

    def upload(self, name: str, file: Path | bytes) -> None:
        """Send a large file before the commit that will show it, so that not all of them must lie here at once."""
        operation = CommitOperationAdd(name, file)
        with hub_errors(self.repo_id, self.token):
            self.api.preupload_lfs_files(self.repo_id, [operation], repo_type=self.kind, revision=self.branch)
        self._uploaded[name] = operation

    def commit(self, files: Mapping[str, Path | bytes], message: str, *, replaces: re.Pattern[str]) -> CommitInfo:
        """Put `files` (path in the repository -> file or content) and those uploaded before there, and delete in the same
        commit what matches `replaces` and is not among them."""
        refuse_secrets(files)
        with hub_errors(self.repo_id, self.token):
            head = self.api.repo_info(self.repo_id, repo_type=self.kind, revision=self.branch).sha
            present = self.api.list_repo_files(self.repo_id, repo_type=self.kind, revision=head)
        stale = [name for name in present if replaces.fullmatch(name) and name not in files and name not in self._uploaded]
        operations = [
            *self._uploaded.values(),
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        try:
            return self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                repo_type=self.kind,
                revision=self.branch,
                parent_commit=head,
            )
        except CLIENT_ERRORS as error:
            return self._after_failure(error, head, files, stale, message)

    def _after_failure(
        self, error: Exception, head: str | None, files: Mapping[str, Path | bytes], stale: list[str], message: str
    ) -> CommitInfo:
        """A lost answer is no failed push: ask what the repository holds, and say which of the two it is."""
        reason = explain(error, self.repo_id, self.token)
        try:
            now = self.api.repo_info(self.repo_id, repo_type=self.kind, revision=self.branch).sha
            arrived = now != head and self._holds(files, stale, now)
        except CLIENT_ERRORS:
            raise HubError(f"{reason}. It cannot be asked whether the push arrived: all of it has, or nothing") from error
        if arrived:
            url = f"{self.api.endpoint}/{constants.REPO_TYPES_URL_PREFIXES.get(self.kind, '')}{self.repo_id}/commit/{now}"
            return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=str(now))
        raise HubError(f"{reason}. Nothing of this push is in {self.repo_id}") from error

    def _holds(self, files: Mapping[str, Path | bytes], stale: list[str], revision: str | None) -> bool:
        names = [*self._uploaded, *files, *stale]
        found = {
            entry.path: entry for entry in self.api.get_paths_info(self.repo_id, names, repo_type=self.kind, revision=revision)
        }
        if set(found) != {*self._uploaded, *files}:
            return False
        sums = {name: operation.upload_info.sha256.hex() for name, operation in self._uploaded.items()}
        for name, entry in found.items():
            content = files.get(name)
            lfs = getattr(entry, "lfs", None)
            if content is None:
                same = lfs is not None and lfs.sha256 == sums[name]
            else:
                content = content if isinstance(content, bytes) else content.read_bytes()
                same = (
                    lfs.sha256 == hashlib.sha256(content).hexdigest()
                    if lfs
                    else getattr(entry, "blob_id", "") == _git_oid(content)
                )
            if not same:
                return False
        return True


def _git_oid(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
