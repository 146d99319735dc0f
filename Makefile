# Every target makes the virtual environment it needs: a fresh machine needs Python 3.11+, make and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu bench-gpu docs lint format dist fresh

help:            ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with besa and all it needs, exactly pinned

# torch goes first and exactly, so that no other requirement decides which build of it comes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "besa needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(READY)   ## prune SmolLM2-135M by Wanda and BESA, and show what is left of it
	$(BIN)/besa demo

test: $(READY)   ## the fast tests
	$(BIN)/python -m pytest -m 'not slow' --numprocesses auto --dist loadfile --durations 25 --durations-min 5

test-slow: $(READY) ## the tests that take minutes, and cases that resemble faster ones
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY) ## the tests on a GPU, if there is one
	$(BIN)/python -m pytest tests/gpu --confcutdir tests/gpu

bench-gpu: $(READY) ## speed and memory on a GPU: a block of 7B and 70B by recipe, and the kernels
	$(BIN)/python -m benchmarks.gpu

docs: $(READY)   ## the documentation as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)   ## ruff, mypy, and the contract that imports point down
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

dist: $(READY)   ## the wheel and the sources in dist/, built twice to the same bytes
	$(BIN)/python release/dist.py

fresh: dist      ## install that wheel in fresh environments, with each extra, and prune a block there
	$(BIN)/python release/fresh.py

format: $(READY) ## let ruff write the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
