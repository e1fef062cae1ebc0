# flowtilt needs bash, make and Python 3.11 or newer; `make help` lists what it does.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# The newest Python that runs; a version manager's stand-in for one that is not installed does not.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$python"; break; }; done)
VENV ?= .venv
EXTRAS ?= workflow,dev,molecules,parallel,images
CORES ?= all
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
# Where Python is told to write no bytecode, each of hundreds of jobs would compile the package again.
COMPILE := $(BIN)/python -m compileall -q src
SNAKEMAKE := $(BIN)/snakemake --workflow-profile workflow/profiles/default --cores $(CORES)
# The order of tests/conftest.py: what takes longest begins first.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup --no-loadscope-reorder

.PHONY: help env results report quick lint style types fast test test-all unlock benchmark docs clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON (interpreter for the environment), VENV (its folder, $(VENV)), EXTRAS (of the package," \
		"$(EXTRAS)), CORES ($(CORES)), WORKERS (processes that run tests, $(WORKERS))."

env: $(STAMP) ## make the environment in .venv, with the pinned versions

results: $(STAMP) ## run everything: models, samples, tables, figures
	@$(COMPILE)
	$(SNAKEMAKE)

report: $(STAMP) ## one HTML page of all results, results/report.html
	$(SNAKEMAKE) --report results/report.html

quick: $(STAMP) ## run every stage at smoke size, a first look in a few minutes
	@$(COMPILE)
	$(SNAKEMAKE) --configfile config/smoke.yaml

lint: style types ## linters and types

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

types: $(STAMP)
	$(BIN)/mypy

fast: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow"

# mypy reads torch for a minute, on one core: the tests begin meanwhile.
test: style ## linters, types, and the fast tests with one smoke run of the pipeline: minutes
	@$(COMPILE)
	@$(MAKE) --no-print-directory --jobs=2 types fast

test-all: $(STAMP) ## what `make test` leaves out: interruptions, SLURM, browser, environments, full grids
	@$(COMPILE)
	OMP_NUM_THREADS=1 $(PYTEST) -m slow

unlock: $(STAMP) ## after Snakemake was killed: take away the lock that it has left
	$(SNAKEMAKE) --unlock

benchmark: $(STAMP) ## measure speed and memory
	$(BIN)/python -m benchmarks

docs: $(STAMP) ## write the configuration's reference
	$(BIN)/flowtilt config-reference --output config/README.md

clean: ## remove caches and intermediate results; tables and figures stay
	rm -rf .snakemake .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf results/{configs,data,runs,theory,logs,benchmarks,pages,smoke,paper} results/{resolution.json,report.html}
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	rm -rf $(VENV)

# Made again only when what it should hold has changed.
$(STAMP): pyproject.toml envs/constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found as python3.13, python3.12," \
		"python3.11 or python3. Install one, or name it: make env PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) does not run, or is older than Python 3.11; name another: PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments:" \
		"its module venv or ensurepip is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c envs/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
