# What a newcomer needs: `make demo` and `make test`. What a change must pass: `make check`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/package-installed
INSTALLED := $(VENV)/installed
# Test processes that run side by side, one more than there are cores, because many tests wait for other processes. A
# worker takes the tests of its own part in order, which keeps the tests that share a fixture together, and then takes
# over tests of the other workers.
WORKERS ?= $(shell expr 1 + $$(getconf _NPROCESSORS_ONLN))
# Kinds of tests that CI may skip on this machine; tests/conftest.py has the names.
MAY_LACK ?=
PYTEST := $(BIN)/python -m pytest --may-lack "$(MAY_LACK)"
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist worksteal

.PHONY: help demo test check dist lock long fuzz types tests format clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PACKAGE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlx-k2 needs Python 3.11 or newer; give one with make PYTHON=...")'
	@echo "installing mlx-k2 and the packages that it needs in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tools]'
	@touch $@

$(INSTALLED): $(PACKAGE)
	@echo "installing the packages of the tests in $(VENV), 1 GB in all"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	@touch $@

demo: $(PACKAGE)  ## Stream an answer from two stages on this machine
	$(BIN)/mlx-k2 generate --stages 2 --model built-in "What is mlx-k2?" </dev/null

test: $(INSTALLED)  ## Run all but the slow tests, in less than 5 minutes
	$(PYTEST) $(SIDE_BY_SIDE) -m "not slow"

check: $(INSTALLED)  ## The gate: format, lint, types, all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs=2 types tests

types: $(INSTALLED)
	$(BIN)/mypy

tests: $(INSTALLED)
	$(PYTEST) $(SIDE_BY_SIDE)

long: $(INSTALLED)  ## Full counts, by hand: the soak for hours, the whole fault matrix, many examples of each property
	failed=0; \
	for part in "bench.soak --minutes 60" "bench.soak --restarts 200" "bench.faults" "bench.serve_load" \
	    "pytest $(SIDE_BY_SIDE) --hypothesis-profile=long --timeout=3600"; do \
	    $(BIN)/python -m $$part || failed=1; \
	done; exit $$failed

fuzz: $(INSTALLED)  ## Run the property tests with random seeds and many examples
	$(PYTEST) $(SIDE_BY_SIDE) -m hypothesis --hypothesis-profile=fuzz --timeout=3600

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: $(INSTALLED)  ## Build the wheel and the source archive in dist/
	$(BIN)/python -m build --no-isolation

lock:  ## Write the newest versions that fit pyproject.toml to constraints.txt
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	build/lock/bin/python -m pip install --quiet --editable '.[tools]' --group dev
	{ echo "# Made by make lock: the versions that the tests passed with."; \
	    build/lock/bin/python -m pip freeze --exclude-editable; } > constraints.txt

clean:  ## Remove what make made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/metal_cpu/build
