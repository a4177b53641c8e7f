# What a newcomer needs: `make demo` and `make test`. What a change must pass: `make check`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Tests that start no stages.
COMPUTING := $(addprefix tests/,engine kernels metal_cpu model text)

.PHONY: help demo test check types computing others format clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlx-k2 needs Python 3.11 or newer; give one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

demo: $(INSTALLED)  ## Stream an answer from two stages on this machine
	$(BIN)/mlx-k2 generate "What is mlx-k2?"

test: $(INSTALLED)  ## Run every test that this machine can run
	$(BIN)/python -m pytest

check: $(INSTALLED)  ## The gate: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs=2 others computing

# Two halves of the tests, side by side: those with stages wait a good deal.
computing: types
	$(BIN)/python -m pytest --quiet $(COMPUTING)

others: $(INSTALLED)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(COMPUTING))

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove what make made
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
