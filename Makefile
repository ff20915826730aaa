# make env    install everything into .venv
# make demo   train a small Llama on split sequences on this machine's CPU, about two minutes
# make lint   style, types and the order of the modules
# make test   lint, then the tests
# make nightly  lint, then the tests with all cases of long sweeps
# make quick  the tests that start no processes, under a minute
# make gpu-bench  what one GPU can do, in less than ten minutes
# make lowest the quick tests and a few exact steps on the lowest versions, in .venv-lowest
# make docs   the site of docs/ into site/

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

# DeepSpeed looks for ninja on the path.
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: env demo lint format test nightly quick gpu-bench lowest docs
.DEFAULT_GOAL := test

env: $(STAMP)

# torch comes first and pinned: left to the requirements of other packages, pip may choose a build with gigabytes of CUDA.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev,hf]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/pretrain.py fit --config configs/demo_cpu.yaml

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Two at a time: each has a pool of four processes of its own.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m 'not nightly'

nightly: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal

quick: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m 'not processes and not nightly'

gpu-bench: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

LOWEST := .venv-lowest

$(LOWEST)/.installed: pyproject.toml tests/support/lowest.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/support/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[dev,hf]'
	touch $@

lowest: $(LOWEST)/.installed
	PATH=$(abspath $(LOWEST))/bin:$$PATH $(LOWEST)/bin/pytest -m 'not processes and not nightly'
	PATH=$(abspath $(LOWEST))/bin:$$PATH $(LOWEST)/bin/pytest tests/parity/test_core.py tests/parity/test_exactness.py \
		tests/trainer/test_load.py tests/upstream

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
