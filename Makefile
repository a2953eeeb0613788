PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help .venv quickstart test test-slow lint types format clean assets

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

.venv: $(INSTALLED)  ## Create the virtual environment (PYTHON chooses the interpreter, VENV the folder)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## Train and compare timestep experts on the embedded world
	$(BIN)/timestep-experts run recipes/quickstart.yaml

test: lint types  ## Run all checks, then the fast tests
	$(BIN)/pytest

test-slow: $(INSTALLED)  ## Run the tests that train or render for minutes
	$(BIN)/pytest -m slow

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)  ## Check the types
	$(BIN)/mypy

format: $(INSTALLED)  ## Rewrite what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove caches and build outputs; the virtual environment and runs stay
	rm -rf dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

assets: $(INSTALLED)  ## Retrain the judge and the base model of the embedded world (about an hour)
	$(BIN)/python scripts/train_judge.py
	$(BIN)/python scripts/pretrain_base.py --pictures scenes/flat --autoencoder-pictures scenes/flat scenes/neon \
		--work work/scenes --output src/timestep_experts/world/assets/base
