PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help .venv quickstart comparison cifar10 bench test test-slow test-faults fuzz mutants lint types format clean assets

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

.venv: $(INSTALLED)  ## Create the virtual environment (PYTHON chooses the interpreter, VENV the folder)

$(RUNTIME): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(INSTALLED): $(RUNTIME)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The networks of the embedded world are so small that one thread is nearly as fast as two (benchmarks/neighbour.py).
quickstart: export OMP_NUM_THREADS ?= 1
quickstart: $(RUNTIME)  ## Train a LoRA with gates over the noise level beside a plain one (seven minutes with the installation)
	$(BIN)/timestep-experts run recipes/quickstart.yaml

comparison: $(RUNTIME)  ## The same with every kind of experts, and copies, and the LoRAs that are fair rivals (half an hour)
	$(BIN)/timestep-experts run recipes/comparison.yaml

WORK := work/cifar10
SEEDS ?= 0 1
BASE_STEPS ?= 3000

cifar10: $(WORK)/base/model_index.json $(WORK)/features.safetensors  ## Compare decoupled experts with finetunes on an archive (CIFAR10=file.npz; about two hours)
	$(BIN)/python benchmarks/deme.py recipes/cifar10.yaml --seeds $(SEEDS) --output benchmarks/results/cifar10.json

$(WORK)/pictures/report/metadata.jsonl: | $(INSTALLED)
	$(BIN)/python scripts/export_cifar10.py --archive $(CIFAR10) --output $(WORK)/pictures

$(WORK)/base/model_index.json: | $(WORK)/pictures/report/metadata.jsonl
	$(BIN)/python scripts/pretrain_base.py --architecture ddpm --pictures $(WORK)/pictures/train --resolution 32 --flip \
		--weighting none --steps $(BASE_STEPS) --checkpointing-steps 250 --work $(WORK)/base-training --output $(WORK)/base

$(WORK)/features.safetensors: | $(WORK)/pictures/report/metadata.jsonl
	$(BIN)/python benchmarks/picture_features.py --pictures $(WORK)/pictures/train \
		--held-out $(WORK)/pictures/choose --output $@

bench: $(INSTALLED)  ## Measure what experts cost in time and memory (BENCH='--sections layers' for a part)
	$(BIN)/python benchmarks/speed.py $(BENCH)

test: lint types  ## Run all checks, then the fast tests
	$(BIN)/pytest

test-slow: $(INSTALLED)  ## Run the tests that train or render for minutes
	$(BIN)/pytest -n 0 -m slow

test-faults: $(INSTALLED)  ## Kill real runs, fill disks, start two at once (FAULTS adds options of pytest)
	$(BIN)/pytest -n 0 -m faults $(FAULTS)

fuzz: $(INSTALLED)  ## Feed thousands of damaged files to all readers (FUZZ='--count 5000 --kind bundle')
	$(BIN)/python scripts/fuzz.py $(FUZZ)

mutants: $(INSTALLED)  ## Change one operator of a formula at a time and see whether a test notices (MUTANTS='--count 20')
	$(BIN)/python -m pip install -q cosmic-ray
	$(BIN)/python scripts/mutants.py $(MUTANTS)

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
