# `make quickstart` and `make test` work on a fresh machine with Python 3.11 or newer: each makes its own .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint

quickstart: .venv/installed
	$(BIN)/logitmix quickstart

test: lint
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@# torch alone and first, so that nothing else decides which build of it is taken
	$(BIN)/pip install --quiet torch==2.13.0
	@# compat: else a script beside the clone, a folder of the package's name, imports the folder
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=compat
	touch $@
