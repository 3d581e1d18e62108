# Everything generated goes to .venv/ and .local/. `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# Most tests wait for processes that they started, so a few at once do not wait for cores.
JOBS ?= 3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LIGHT = .local/light-$(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
define CHECK_PYTHON
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
  echo "Spotfirst needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
endef
# One stamp per torch, so that `make setup TORCH=…` notices the change.
STAMP := .venv/.ready-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.\n' _)

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(STAMP)  ## Create .venv with everything, once (TORCH='torch==…' for another torch)

$(STAMP): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	mkdir -p .local
	@# The environment's torch is TORCH; everything else is what constraints.txt says.
	grep -v '^torch==' constraints.txt > .local/constraints.txt
	$(PIP) install --quiet --constraint .local/constraints.txt $(TORCH) --editable '.[airflow,cluster,torch,frameworks,dev]'
	rm -f .venv/.ready-*
	touch $@

.PHONY: test
test: setup  ## Run all tests (ARGS='tests/… -k …' for some, JOBS=1 for one at a time)
	$(BIN)/python -m pytest --numprocesses $(JOBS) $(ARGS)

.PHONY: test-light
test-light:  ## Run the tests that need no torch with another Python (PYTHON=python3.13)
	@$(CHECK_PYTHON)
	test -x $(LIGHT)/bin/python || $(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints.txt --editable '.[airflow,cluster,dev]'
	$(LIGHT)/bin/python -m pytest --numprocesses $(JOBS) $(ARGS)

.PHONY: lint
lint: setup  ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@# What Python 3.10 lacks. torch.long is no long integer of Python 2.
	$(BIN)/vermin --quiet --no-tips --target=3.10- --violations --exclude long \
	  checkpointing operators plugins dags devstack benchmarks tests

.PHONY: format
format: setup  ## Format the code and repair what can be repaired
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: bench
bench: setup  ## Run the benchmarks (ARGS=…)
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: demo
demo: setup  ## Train through interruptions, in Airflow, on this machine (EXIT=1: end when it is done)
	$(BIN)/python -m devstack.demo $(if $(EXIT),--exit) $(ARGS)

.PHONY: airflow
airflow: setup  ## Run Airflow with the example DAGs and an S3 server until Ctrl-C
	$(BIN)/python -m devstack.airflow $(ARGS)

.PHONY: s3
s3: setup  ## Run an S3 server until Ctrl-C
	$(BIN)/python -m devstack.s3 $(ARGS)

.PHONY: constraints
constraints:  ## Resolve constraints.txt again (UPGRADE=1: to the newest versions)
	mkdir -p .local
	test -x .local/uv/bin/uv || { $(PYTHON) -m venv .local/uv && .local/uv/bin/pip install --quiet uv; }
	grep -v '^#' constraints.txt > .local/resolved.txt
	.local/uv/bin/uv pip compile --quiet --universal --python-version 3.10 --all-extras pyproject.toml \
	  --no-header --no-annotate $(if $(UPGRADE),--upgrade) --output-file .local/resolved.txt
	{ grep '^#' constraints.txt; grep -vE '^(nvidia-|cuda-|triton)' .local/resolved.txt; } > .local/new.txt
	mv .local/new.txt constraints.txt

.PHONY: clean
clean:  ## Remove everything generated: .venv, .local, caches
	rm -rf .venv .local dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
