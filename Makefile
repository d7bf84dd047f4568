# Everything from nothing: `make demo` and `make test` need Python >= 3.11 with pip and venv, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-all lint format docs clean

demo: $(VENV)/demo
	$(BIN)/attnzoo compose recipes/ham_a.yaml

test: $(VENV)/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/dev lint
	@echo "All tests, the slow ones too: about an hour and three quarters on two cores"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/website.py

clean:
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build

$(VENV)/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) --editable ".[dev]"
	touch $@

$(VENV)/docs: $(VENV)/dev
	$(PIP) --editable ".[dev,docs]"
	touch $@
