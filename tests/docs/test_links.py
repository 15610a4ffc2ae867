"""Links between the documents lead somewhere, on the disk and on the site."""

import importlib
import re
import tomllib

import pytest
from documents import DOCS, DOCUMENTS, README, ROOT, anchors, links

import sim_hf

API = sorted({name for path in DOCS for name in re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.M)})
PAGES = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "assets" / "sim-tiny" / "README.md"]


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_to_files_and_headings(path):
    dead = []
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_pages_of_the_site_link_to_pages_of_the_site(path):
    outside = [link for link in links(path) if not (path.parent / link).resolve().is_relative_to(ROOT / "docs")]
    assert not outside, "the site has only what lies in docs/"


def test_the_navigation_leads_to_pages():
    named = set(pages_of(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    assert named and not {name for name in named if not (ROOT / "docs" / name).exists()}
    assert {path.relative_to(ROOT / "docs").as_posix() for path in DOCS} - named == set(), "add the page to zensical.toml"


@pytest.mark.parametrize("name", API)
def test_the_reference_names_what_exists(name):
    module, _, last = name.rpartition(".")
    assert hasattr(importlib.import_module(module), last) or importlib.import_module(name)


def test_the_reference_has_the_public_names():
    assert set(sim_hf.__all__) - {"__version__"} <= {name.rpartition(".")[2] for name in API}


def test_the_readme_is_short_and_its_picture_small():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 250
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.stat().st_size > 200_000]
    assert not pictures


def pages_of(navigation):
    for entry in navigation:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages_of(target)
