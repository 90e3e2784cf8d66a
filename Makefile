# Commands: `make figures`, `make companions` and `make test`. Each makes the environment it needs first (once: `make env` is a no-op
# as long as the pins stay the same).
#
#   TIER=smoke|laptop|overnight|converged|smollm-claims|paper   how much to run (default laptop; see README.md)
#   BENCH=no                                   leave out the benchmark: no Figure 6 and none of its tables
#   CORES=all                                  cores that the figures may use
#   CONFIG="build=... models=..."              more of snakemake's --config: folders of results and of models
#   ARGS="..."                                 anything more for snakemake, or for pytest in `make test`
#   PYTHON=python3.11                          interpreter that makes the environment
#   VENV=.venv                                 where it lies

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help figures companions test lint env lock clean distclean

ifdef tier
$(error write TIER=$(tier), in capitals)
endif
ifdef bench
$(error write BENCH=$(bench), in capitals)
endif
ifneq ($(filter --config --config=% -C,$(ARGS)),)
$(error ARGS: a second --config would replace TIER and BENCH; write CONFIG="build=..." instead)
endif
TIER ?= laptop
CONFIG ?=
CORES ?= all
BENCH ?= yes
ARGS ?=
VENV ?= .venv
# 3.11 is what the pins are tested with, so it comes first; the check also refuses one without venv or headers.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" tools/environment.py check >/dev/null 2>&1 && echo "$$name" && exit; done; echo python3)

# Recipes read these from the environment, quoted: their values, and the folder of the clone, may hold anything.
export TIER CORES BENCH VENV

# Nothing from outside reaches in: no user site, no other project's modules, no model hub.
unexport PYTHONPATH PYTHONHOME
# Every job is a process of its own; compiling its imports anew would take longer than a small job's work.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONNOUSERSITE := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# What runs in the environment: its own interpreter by its path, its other commands by PATH.
IN_ENV = export PATH="$$(cd -- "$$VENV/bin" && pwd):$$PATH"; python="$$(cd -- "$$VENV/bin" && pwd)/python";

help:
	@echo "make figures [TIER=laptop]   run what is missing and draw figures/"
	@echo "make figures BENCH=no      the same without the benchmark, so without Figure 6 and its tables"
	@echo "make companions [TIER=laptop]   sister systems beside ReQAT: their tables and figures in build/"
	@echo "make test                  the tests (ARGS=\"-m long\": those that take half a minute or more each)"
	@echo "make lint                  ruff, mypy, snakemake --lint"
	@echo "make env                   only the environment, in .venv (VENV=...)"
	@echo "make lock                  resolve requirements.in anew: requirements.lock, environment.yml"
	@echo "make clean                 remove figures/ and caches; keeps build/, where results took hours"
	@echo "make distclean             remove build/, .snakemake/ and the environment too"

figures: env
	@$(IN_ENV) case "$$BENCH" in no) without=--no-bench;; *) without=--bench;; esac; \
	"$$python" -m reqat.cli doctor --quick --tier "$$TIER" "$$without"; \
	if [ "$$CORES" = all ]; then CORES="$$("$$python" -m reqat.config.machine cores)"; fi; \
	"$$python" -m snakemake --cores "$$CORES" --config tier="$$TIER" bench="$$BENCH" $(CONFIG) $(ARGS) -- figures/

# A companion that fails keeps no other from being made.
companions: env
	@$(IN_ENV) if [ "$$CORES" = all ]; then CORES="$$("$$python" -m reqat.config.machine cores)"; fi; \
	"$$python" -m snakemake --keep-going --cores "$$CORES" --config tier="$$TIER" bench=no $(CONFIG) $(ARGS) -- companions

# tests/conftest.py gives each process one thread, and puts files of slow tests first; the workers share the cores.
# Tests marked `long` run on demand: make test ARGS="-m long", or ARGS="-m ''" for all.
test: env
	@$(IN_ENV) "$$python" -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
	-m "not long" $(ARGS)

lint: env
	@$(IN_ENV) "$$python" -m ruff check
	@$(IN_ENV) "$$python" -m mypy
	@$(IN_ENV) "$$python" -m snakemake --lint

env:
	@python="$(PYTHON)"; command -v "$$python" >/dev/null || { \
	echo "error: no '$$python' found. Debian, Ubuntu: sudo apt install python3.11 python3.11-venv python3.11-dev"; \
	exit 1; }; "$$python" tools/environment.py create "$$VENV"

lock: env
	@$(IN_ENV) "$$python" tools/environment.py lock

clean:
	rm -rf figures .pytest_cache .mypy_cache .ruff_cache .hypothesis dist *.egg-info
	find . -name __pycache__ -not -path "./$$VENV/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf build .snakemake .venv.lock
	if [ -f "$$VENV/pyvenv.cfg" ]; then rm -rf -- "$$VENV"; fi
