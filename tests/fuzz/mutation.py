"""Garbage that begins as something sound: bytes are changed, cut, repeated, and values of JSON are replaced."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

_NASTY = [
    *(
        None,
        True,
        -1,
        0,
        2**31,
        2**63,
        2**64,
        10**400,
        1e308,
        -0.0,
        0.5,
        "",
        " ",
        "1",
        "nan",
        "\x00",
        "\ud800",
        "../x",
        "a" * 5000,
    ),
    *([], [[]], {}, [None], [1, 2, 3], [1e400, 1, 1, 1], {"size": [80, 100], "counts": [8000]}, {"size": [1, 1], "counts": "0"}),
]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of `seeds`, damaged in one to eight places."""
    data = draw(st.sampled_from(seeds))
    if draw(st.booleans()):
        data = _with_other_values(draw, data)
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = start + draw(st.integers(0, 16))
        middle = draw(
            st.one_of(st.binary(max_size=8), st.just(data[start:end] * 2), st.sampled_from([b"", b"\x00", b"\xff", b"[" * 200]))
        )
        data = data[:start] + middle + data[end:]
    return data


def _with_other_values(draw: st.DrawFn, data: bytes) -> bytes:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(document))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if action == "replace":
            container[key] = copy.deepcopy(draw(st.sampled_from(_NASTY)))
        elif action == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _places(node: Any):
    """(container, key) of every value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from _places(value)
