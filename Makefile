# The two commands a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test check lint unit slurm-packages

help:
	@echo "make demo   train a small model here, no Slurm needed"
	@echo "make test   everything, with a real Slurm cluster on this machine (Debian, root)"
	@echo "make check  the fast tier: lint, types, imports, unit and contract tests"

env: $(STAMP)

# torch first and by itself: a bare `torch` pulls gigabytes of CUDA on machines that have none.
$(STAMP): pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $(STAMP)
