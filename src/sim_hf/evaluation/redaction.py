"""What looks like a secret does not get into records: a command may have been typed with a token in it."""

from __future__ import annotations

import re

HIDDEN = "***"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{10,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}")
_NAMED = re.compile(r"(?i)^(--?[\w-]*(?:token|secret|password|api[_-]?key)=).+")
_USER_OF_URL = re.compile(r"(://)[^/@\s]+@")
_QUERY_OF_URL = re.compile(r"(://[^?\s]+\?).+")


def without_secrets(word: str) -> str:
    """A word of a command line without access tokens, and without the user and the query of an address."""
    word = _NAMED.sub(rf"\1{HIDDEN}", _TOKEN.sub(HIDDEN, word))
    return _QUERY_OF_URL.sub(rf"\1{HIDDEN}", _USER_OF_URL.sub(rf"\1{HIDDEN}@", word))
