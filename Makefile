# Needs make and Python 3.11 or later with venv; everything else is installed into $(VENV).
#   make demo PYTHON=python3.13 VENV=.venv-3.13     with another Python
#   make test ARGS="-k config"                      some tests

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 6
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The demo needs less than development does, so it takes the environment that is there.
DEMO_READY := $(if $(wildcard $(VENV)/.dev-ready),$(VENV)/.dev-ready,$(VENV)/.demo-ready)

.PHONY: help demo chaos mutants bench test lint format venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    send a campaign of 1,000 mails through private servers, watch it, check it"
	@echo "make chaos   prove that no job is lost and none done twice: 20,000 jobs, 40 faults (ARGS='--jobs N --faults M --seed S')"
	@echo "make mutants see that the proof notices: every broken variant of pmqd must fail it"
	@echo "make bench   measure pmqd beside its peers, in turns on private servers (ARGS='--peers a,b --work drain,pickup --rounds 5 --json FILE')"
	@echo "make test    run the tests on private PostgreSQL and Redis servers"
	@echo "make lint    ruff and mypy"
	@echo "make format  format the code"
	@echo "make venv    the development environment in $(VENV)"
	@echo "make clean   remove $(VENV), caches and build results"

demo: $(DEMO_READY)
	$(BIN)/pmqd demo $(ARGS)

chaos: $(DEMO_READY)
	$(BIN)/python -m pmqd.chaos $(ARGS)

mutants: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -n 2 tests/mutants $(ARGS)

bench: $(VENV)/.dev-ready
	$(BIN)/python -m benchmarks $(ARGS)

test: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev-ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(VENV)/.dev-ready

$(VENV)/.%-ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .pmqd dist build
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
