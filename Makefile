# Python 3.11 (or newer) and make are all that has to be there. The first target makes .venv and installs what requirements.txt
# pins; later ones reuse it and need no network, until requirements.txt or pyproject.toml change.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PYTHON := $(VENV)/bin/python
# What is installed is known by the content of the two files (and by the folder, to which the package is linked).
INSTALLED := $(VENV)/.installed-$(shell { echo "$(CURDIR)"; cat requirements.txt pyproject.toml; } | cksum | tr ' ' '-')

DATA ?=
ARGS ?=
MINUTES ?= 2

.PHONY: help install demo space docs test e2e scorecard fuzz audit soak check bench format clean

help:  ## What can be made
	@echo "make TARGET [DATA=folder-or-Hub-id] [ARGS=\"more options\"]"
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):[^#]*## *(.*)/  \1\t\2/' | expand -t 12
	@echo "for example: make demo DATA=photos ARGS=\"--compare\"     (all options: $(VENV)/bin/sim-hf demo --help)"

demo: $(INSTALLED)  ## Train from boxes for some minutes, show masks and mask AP: generated scenes, or DATA=folder
	$(PYTHON) -m sim_hf demo $(if $(DATA),--data "$(DATA)") $(ARGS)

space: $(INSTALLED)  ## The web page, on the shipped model or SIM_MODEL=folder-or-Hub-id
	$(PYTHON) spaces/box-supervised-segmentation/app.py

docs: $(INSTALLED)  ## The pages of docs/ as a site with the API reference: build/docs/index.html
	@$(PYTHON) -c 'import zensical, mkdocstrings_handlers.python' 2> /dev/null \
		|| $(PYTHON) -m uv pip install --python $(PYTHON) --no-build-isolation --editable '.[docs]' \
		|| $(PYTHON) -m pip install --quiet --no-build-isolation --editable '.[docs]'
	$(PYTHON) -m zensical build --clean --strict

test: $(INSTALLED)  ## The tests: offline, on the CPU
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(ARGS)

e2e: $(INSTALLED)  ## The slow tests: the command line from end to end
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m e2e $(ARGS)

scorecard: $(INSTALLED)  ## Inject the 36 faults; writes docs/reliability.md (ARGS="--fast", "--slow", "--rows 1 19")
	OMP_NUM_THREADS=1 $(PYTHON) tests/scorecard $(ARGS)

fuzz: $(INSTALLED)  ## Feed garbage to everything that reads foreign bytes, MINUTES=2 each (ARGS=--atheris)
	OMP_NUM_THREADS=1 $(PYTHON) tests/fuzz --minutes $(MINUTES) $(ARGS)

audit: $(INSTALLED)  ## Security rules, pickles, secrets; known vulnerabilities of the pinned packages where a network is
	$(PYTHON) -m ruff check --select S --ignore S101 src spaces scripts
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/test_supply_chain.py
	$(PYTHON) -m uv pip check --python $(PYTHON)
	$(PYTHON) tests/known_vulnerabilities.py

soak: $(INSTALLED)  ## Train, predict and serve for long with flat memory: about an hour
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m soak -s $(ARGS)

check: $(INSTALLED)  ## Lint, formatting and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

bench: $(INSTALLED)  ## The benchmarks: minutes
	for file in benchmarks/load_coco.py benchmarks/speed.py; do echo "$$file"; $(PYTHON) "$$file"; done

format: $(INSTALLED)  ## Put imports and formatting right
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

install: $(INSTALLED)  ## Only make .venv and install (what the others do first)
	@echo "installed in $(VENV)"

clean:  ## Remove caches and build products; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis .cache build dist
	find . \( -name .git -o -name $(VENV) -o -name runs \) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# uv installs in a fraction of pip's time; where it cannot be had, pip does the same work.
$(INSTALLED): | $(PYTHON)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(VENV) holds $$($(PYTHON) --version), 3.11 or newer is needed: remove it and try again" >&2; exit 1; }
	@echo "installing the pinned packages into $(VENV) (some GB the first time) ..."
	@if $(PYTHON) -m uv --version > /dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv; then \
		install=("$(PYTHON)" -m uv pip install --python "$(PYTHON)"); \
	else \
		echo "uv could not be installed, using pip"; install=("$(PYTHON)" -m pip install --quiet); \
	fi; \
	"$${install[@]}" -r requirements.txt; \
	"$${install[@]}" --no-deps --no-build-isolation --editable .
	@$(PYTHON) tests/conformance/fetch.py
	@rm -f $(VENV)/.installed-*
	@touch $@

$(PYTHON):
	@for candidate in python3.11 python3 python3.13 python3.12 python; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
		echo "Python 3.11 or newer is needed, and none was found as python3.11 or python3 on the PATH" >&2; exit 1; \
	fi; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$$found cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
