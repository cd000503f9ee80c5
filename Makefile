# `make run` sets everything up and runs the main job; `make help` lists the rest.

PYTHON ?= python3
BIN := .venv/bin
# Three files of tests at a time, on two cores: much of it is waiting for servers and processes.
SIDE_BY_SIDE := --numprocesses 3 --dist loadfile

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.PHONY: install
install: .venv/.installed  ## create and fill .venv with the versions of constraints.txt

.venv/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --compile-bytecode --constraint constraints.txt --editable ".[dev]"
	@touch $@

.PHONY: run
run: install  ## the main job: cutouts to a registered ensemble
	$(BIN)/lens-pipeline run

.PHONY: dev
dev: install  ## Dagster's and MLflow's pages on the same LENS_HOME
	$(BIN)/lens-pipeline show

.PHONY: test
test: install  ## the tests, without the slow ones
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not gpu"

.PHONY: test-slow
test-slow: install  ## the slow tests: kill trials, the default job
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --no-loadscope-reorder -m "slow and not gpu"

.PHONY: lint
lint: install  ## style, types, which floor may import which, and the deployment's files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose*.yaml

.PHONY: bench
bench: install  ## the benchmarks, one after another
	@for file in benchmarks/[a-z]*.py; do \
	  $(BIN)/python -m benchmarks.$$(basename $$file .py); done

.PHONY: pictures
pictures: install  ## the README's pictures, from the home of the last run
	$(BIN)/python -m docs.pictures
