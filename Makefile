VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart lint types test soak clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed

install: $(VENV)/.installed  ## create .venv (or VENV=path) and install FlexiDiT into it

install-dev: $(VENV)/.installed-dev  ## the same, with what the tests need

quickstart: install  ## the whole story on real digits in a few minutes: see runs/quickstart/report.html
	$(BIN)/flexidit quickstart --out runs/quickstart

lint: install-dev  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev  ## types
	$(BIN)/mypy

test: lint types  ## lint, types and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

soak: install-dev  ## kill training 30 times at random moments and resume it: some minutes, differences must be 0
	$(BIN)/python benchmarks/soak.py --kills 30 --json soak.json

clean:  ## remove what was built, not what was trained
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
