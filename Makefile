# The two commands a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# tinker-cookbook needs an older transformers than the worker; loop and worker need not share an environment.
COOKBOOK := .venv-cookbook
COOKBOOK_STAMP := $(COOKBOOK)/.installed
# SkyRL's JAX server, to be measured beside; never part of a test.
SKYRL := .venv-skyrl
SKYRL_STAMP := $(SKYRL)/.installed
PYTEST := $(BIN)/python -m pytest

# One thread a process: several ranks share the cores, and oversubscription makes gloo tests crawl.
export OMP_NUM_THREADS ?= 1
# Tests make their own models; nothing is looked up on a hub.
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo test check lint unit distributed memory slurm slurm-long loops end-to-end cookbook cookbook-env bench skyrl-env

help:
	@echo "make demo        fine-tune a small model on this machine, no Slurm needed (about two minutes)"
	@echo "make test        everything, on a real Slurm cluster brought up on this machine (Debian or Ubuntu, root)"
	@echo "make check       the fast tier: lint, types, import contracts, unit and contract tests"
	@echo "make distributed megatron parity against transformers + peft, several gloo ranks"
	@echo "make memory      a worker that runs out of memory, by a real limit on it (not part of make test)"
	@echo "make slurm       the Slurm tier alone"
	@echo "make slurm-long  more ways to end a job, and two minutes without slurmctld (not part of make test)"
	@echo "make end-to-end  whole loops: submit, train, sample, save, resume"
	@echo "make cookbook    tinker-cookbook's recipes, unmodified, in an environment of their own (make cookbook-env)"
	@echo "make bench       the benchmarks, long form; writes tests/benchmarks/results"
	@echo "make skyrl-env   SkyRL's JAX server in an environment of its own, for tests/benchmarks/bench_skyrl.py"

env: $(STAMP)

# torch first and by itself: asked for by another package it may arrive with gigabytes of CUDA. compat: an editable
# install by path, so that a folder called tinker_hpc where Python was started does not hide the package.
$(STAMP): pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --config-settings editable_mode=compat -e .
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m tinker_hpc.demo

# Two tiers at a time, since much of both is one process at work or waiting; the Slurm cluster alone, since it times things.
test: check
	@echo "two tiers at a time from here on; what a command prints comes when it is done"
	$(MAKE) --jobs=2 --output-sync=line distributed loops
	$(MAKE) slurm

check: lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

unit: $(STAMP)
	$(PYTEST) tests/unit tests/contract -m "not slow" -n 2

distributed: $(STAMP)
	$(PYTEST) tests/distributed tests/benchmarks --ignore tests/distributed/test_worker_memory.py

# By hand: it sets a real limit on a process's memory, and which allocation meets it first is the machine's affair.
memory: $(STAMP)
	$(PYTEST) tests/distributed/test_worker_memory.py

end-to-end: $(STAMP)
	tests/contract/install.sh
	$(PYTEST) tests/end_to_end
	$(PYTEST) tests/contract -m "slow and not by_hand"

cookbook-env: $(COOKBOOK_STAMP)

$(COOKBOOK_STAMP): tests/cookbook/requirements.txt
	$(PYTHON) -m venv $(COOKBOOK)
	$(COOKBOOK)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(COOKBOOK)/bin/pip install --quiet --disable-pip-version-check -r tests/cookbook/requirements.txt
	touch $(COOKBOOK_STAMP)

loops: $(STAMP)
	$(MAKE) end-to-end
	$(MAKE) cookbook

cookbook: $(STAMP) $(COOKBOOK_STAMP)
	$(PYTEST) tests/cookbook

slurm: $(STAMP)
	tests/slurm/install.sh
	$(PYTEST) tests/slurm -m "not slow"

slurm-long: $(STAMP) $(COOKBOOK_STAMP)
	tests/slurm/install.sh
	$(PYTEST) tests/slurm -m slow
	$(PYTEST) tests/contract -m by_hand

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run_all.py

skyrl-env: $(SKYRL_STAMP)

$(SKYRL_STAMP): tests/benchmarks/skyrl/requirements.txt
	$(PYTHON) -m venv $(SKYRL)
	$(SKYRL)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(SKYRL)/bin/pip install --quiet --disable-pip-version-check -r tests/benchmarks/skyrl/requirements.txt
	touch $(SKYRL_STAMP)
