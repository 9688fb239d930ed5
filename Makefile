# make setup   environment in .venv, once (again when pyproject.toml or constraints.txt change)
# make demo    the main job on a bundled task; make demo ARGS=--quick for a short look
# make check   what CI runs
# PYTHON picks the interpreter of the environment: make setup PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
STAMP := $(VENV)/.setup-done

.PHONY: setup demo test lint format type bench docs compatibility check clean

setup: $(STAMP)

# torch comes first and by its exact pin: asked for by another package's range, it would come with gigabytes of CUDA
# libraries even where a CPU build of the pinned version is at hand.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "setup: expected Python 3.11 or newer, got " + sys.version.split()[0] + "; run make setup PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch (the largest package)"
	$(PIP) torch
	@echo "setup: installing forgetless with its demo and development packages"
	$(PIP) --editable '.[demo,dev]'
	@touch $(STAMP)
	@echo "setup: done; activate with . $(BIN)/activate"

demo: setup
	$(BIN)/forgetless demo $(ARGS)

# Idle OpenMP threads sleep: on a busy machine spinning ones make tiny models several times slower.
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup
	$(BIN)/mypy

bench: setup
	@set -e; for file in benchmarks/bench_*.py; do test -e "$$file" || continue; echo "== $$file"; $(BIN)/python "$$file"; done

# Every relative link of the documentation leads somewhere, every decision page has its parts.
docs: setup
	$(BIN)/python -m pytest -q tests/unit/test_docs.py

# Runs the tests marked `compatibility` and writes what they showed, failures too, into docs/compatibility.md.
# Pytest's status 1 (a test failed) is on the page and in the status of what writes it; any other one is no result. A
# part of the tests, such as ARGS='-k llama', is run and leaves the page as it is.
RESULTS := build/compatibility.json
compatibility: setup
	rm -f $(RESULTS)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m compatibility --compatibility-results $(RESULTS) $(ARGS) || test $$? -eq 1
	$(if $(strip $(ARGS)),@echo "compatibility: a run with ARGS may be a part; docs/compatibility.md is left as it is",PYTHONPATH=tests $(BIN)/python -m compatibility.page $(RESULTS) docs/compatibility.md)

check: lint type test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
