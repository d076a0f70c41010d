# Everything a developer runs. The first call sets up .venv by itself; afterwards no recipe needs the network.
#
#   make test                          every test and doctest
#   make check                         everything CI runs
#   make test ARGS="-k fold -m 'not slow'"
#
# Variables: PYTHON (interpreter that makes .venv), WORKERS (test processes), ARGS (for pytest),
# TORCH_ARGS (for the pip call that installs torch: the place for an index with CPU builds).

PYTHON ?= python3
CORES = import os; print(min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1, 4))
WORKERS ?= $(shell $(PYTHON) -c "$(CORES)")
ARGS ?=
TORCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := data,export,hf,dev
PIP := $(BIN)/python -m pip install --constraint constraints.txt

# One thread a process: the workers share the cores, and sums come out in one order.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# $(call twice,COMMAND): run it, and once more if it fails (a package registry may stumble).
twice = $(1) || { echo "make setup: pip failed; trying once more" >&2; sleep 3; $(1); }

.PHONY: help setup test demo check format-check lint types layers format bench clean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo "make test    set up .venv and run every test and doctest"
	@echo "make demo    train and fold a small network on scikit-learn's digits, into runs/demo"
	@echo "make check   everything CI runs: format, lint, types, layers, tests"
	@echo "make format  rewrite the code in the project's format"
	@echo "make bench   list the benchmarks"
	@echo "make clean   remove .venv and caches"

setup: $(STAMP)

# torch goes in first and alone: a resolver that sees it together with the rest may choose a build with CUDA packages.
# The build tools come next, so that installing the project itself needs no isolated environment and no network.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "weightfold needs Python 3.11 or newer; set PYTHON=/path/to/it. Found: $$($(PYTHON) --version)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@$(call twice,$(PIP) --quiet $(TORCH_ARGS) "torch==2.13.0")
	@$(call twice,$(PIP) --quiet hatchling editables)
	@$(call twice,$(PIP) --quiet --no-build-isolation --editable ".[$(EXTRAS)]")
	@$(BIN)/python -m pip check
	@touch $@

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

demo: $(STAMP)
	$(BIN)/weightfold train digits --out runs/demo --force

check: format-check lint types layers test

format-check: $(STAMP)
	@$(BIN)/ruff format --check .

lint: $(STAMP)
	@$(BIN)/ruff check .

types: $(STAMP)
	@$(BIN)/pyright --version >/dev/null || \
		{ echo "make types: pyright does not start. It needs the nodejs extra: remove $(VENV) and run make setup" >&2; exit 1; }
	@$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(STAMP)
	@$(BIN)/python -m pytest tests/test_layers.py

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)
	@$(BIN)/python -c "import ast, pathlib; [print(f'{p}: {(ast.get_docstring(ast.parse(p.read_text())) or str()).partition(chr(10))[0]}') \
		for p in sorted(pathlib.Path('benchmarks').rglob('*.py')) if not p.name.startswith('_')]"
	@echo "Run one with: $(BIN)/python benchmarks/NAME.py"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist
