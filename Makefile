# Two commands: `make figures` and `make test`. Each makes the environment it needs first (once: `make env` is a no-op
# as long as the pins stay the same).
#
#   TIER=smoke|laptop|claims|overnight|smollm|paper   how much to run (default laptop; see README.md)
#   CORES=all                                  cores that the figures may use
#   ARGS="..."                                 anything more for snakemake, or for pytest in `make test`
#   PYTHON=python3.11                          interpreter that makes the environment
#   VENV=.venv                                 where it lies

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help figures test lint env lock clean distclean

ifdef tier
$(error write TIER=$(tier), in capitals)
endif
TIER ?= laptop
CORES ?= all
ARGS ?=
VENV ?= .venv
# 3.11 is what the pins are tested with, so it comes first; the check also refuses one without venv or headers.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" tools/environment.py check >/dev/null 2>&1 && echo "$$name" && exit; done; echo python3)

# Nothing from outside reaches in: no user site, no other project's modules, no model hub.
unexport PYTHONPATH PYTHONHOME
# Every job is a process of its own; compiling its imports anew would take longer than a small job's work.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONNOUSERSITE := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PATH := $(abspath $(VENV))/bin:$(PATH)

help:
	@echo "make figures [TIER=$(TIER)]   run what is missing and draw figures/"
	@echo "make test                  the tests"
	@echo "make lint                  ruff, mypy, snakemake --lint"
	@echo "make env                   only the environment, in $(VENV)"
	@echo "make lock                  resolve requirements.in anew: requirements.lock, environment.yml"
	@echo "make clean                 remove figures/ and caches; keeps build/, where results took hours"
	@echo "make distclean             remove build/, .snakemake/ and $(VENV) too"

figures: env
	snakemake --cores $(CORES) --config tier=$(TIER) $(ARGS) -- figures/

# tests/conftest.py gives each process one thread; the workers share the cores between them.
test: env
	python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

lint: env
	ruff check
	mypy
	snakemake --lint

env:
	@python="$(PYTHON)"; command -v "$$python" >/dev/null || { \
	echo "error: no '$$python' found. Debian, Ubuntu: sudo apt install python3.11 python3.11-venv python3.11-dev"; \
	exit 1; }; "$$python" tools/environment.py create "$(VENV)"

lock: env
	python tools/environment.py lock

clean:
	rm -rf figures .pytest_cache .mypy_cache .ruff_cache .hypothesis dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf build .snakemake "$(VENV)" .venv.lock
