# Everything from nothing: `make demo` and `make test` need Python >= 3.11 with pip and venv, and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-all lint format docs clean

demo: .venv/demo
	$(BIN)/attnzoo compose recipes/ham_a.yaml

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: .venv/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/website.py

clean:
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build

.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch torchvision
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/demo
	$(PIP) --editable ".[dev]"
	touch $@

.venv/docs: .venv/dev
	$(PIP) --editable ".[dev,docs]"
	touch $@
