"""What a Hub keeps: repositories with their commits, and what it says of a file or a card in them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import yaml

DATE = "2026-01-01T00:00:00.000Z"
TASKS = {"image-segmentation", "object-detection", "image-classification"}
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown"}


@dataclass
class StoredFile:
    oid: str  # sha256 of a large file, git's sha1 of a small one
    content: bytes
    large: bool


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)  # newest commit last
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, StoredFile], title: str) -> str:
        sha = hashlib.sha1(f"{self.kind}{self.name}{len(self.commits)}{title}".encode()).hexdigest()
        self.commits[sha], self.titles[sha] = files, title
        self.branches.setdefault(branch, []).append(sha)
        return sha

    def resolve(self, revision: str) -> str:
        if revision in self.branches:
            return self.branches[revision][-1]
        if revision in self.tags or revision in self.commits:
            return self.tags.get(revision, revision)
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


@dataclass
class Refusal(Exception):
    status: int
    code: str
    message: str
    body: dict | None = None


def small_file(content: bytes) -> StoredFile:
    return StoredFile(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content, large=False)


def entry_of(path: str, file: StoredFile | None, sha: str) -> dict:
    commit = {"lastCommit": {"id": sha, "title": "", "date": DATE}}
    if file is None:
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0, **commit}
    entry = {"type": "file", "path": path, "oid": file.oid[:40], "size": len(file.content), **commit}
    return {**entry, "lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.large else entry


def card_errors(content: str) -> list[str]:
    """What the Hub would say of a card's metadata."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if match is None:
        return []  # a warning on the Hub
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []
    if "license" in data and data["license"] not in LICENCES:
        errors.append(f'"license" must be one of {sorted(LICENCES)}')
    if "pipeline_tag" in data and data["pipeline_tag"] not in TASKS:
        errors.append(f'"pipeline_tag" {data["pipeline_tag"]!r} is not a task')
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key, [])
        if not isinstance(value, list | str) or (isinstance(value, list) and not all(isinstance(v, str) for v in value)):
            errors.append(f'"{key}" must be a list of strings')
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[0].name" is not allowed to be empty')
        for result in model.get("results", []):
            if not {"task", "dataset", "metrics"} <= set(result):
                errors.append('"model-index[0].results[0]" needs task, dataset and metrics')
            elif not all("type" in metric and "value" in metric for metric in result["metrics"]):
                errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors
