# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# TORCH_INDEX=https://... picks a wheel index, for example one with CPU builds of PyTorch.
PIP_FLAGS := -c requirements/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# A process per core; threads of one core would wait for each other.
WORKERS ?= auto
THREADS ?= 1

# On a GPU nothing is installed: $(PYTHON) brings PyTorch, Triton, pytest and hypothesis.
# The packages there are whatever they are, so their deprecations are shown and do not fail.
GPU_ENV    := PYTHONPATH=src PYTHONUNBUFFERED=1 TORCHSPARSE_TEST_DEVICE=cuda
GPU_PYTEST := $(PYTHON) -m pytest -p no:cacheprovider -W default::DeprecationWarning $(PYTEST_FLAGS)
SHARDS     ?= 1/3 2/3 3/3
SANITIZER  ?= compute-sanitizer
TOOL       ?= memcheck

.PHONY: help demo test test-gpu test-gpu-sanitizer lint format docs bench clean
help:
	@echo "make demo    train a network on synthetic streets and look at the result"
	@echo "make test    run the tests"
	@echo "make test-gpu            the tests that touch a device on CUDA, SHARD=1/3 a third of them"
	@echo "make test-gpu-sanitizer  every kernel once under compute-sanitizer"
	@echo "make lint    ruff and the type checker"
	@echo "make docs    the API reference as web pages, in runs/docs"
	@echo "make bench   time layers and networks on this machine"

demo: $(VENV)/.app
	$(BIN)/torchsparse demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8

test-gpu:
	@status=0; for shard in $(or $(SHARD),$(SHARDS)); do \
	    echo "== shard $$shard"; \
	    $(GPU_ENV) TORCHSPARSE_TEST_SHARD=$$shard $(GPU_PYTEST) || status=$$?; \
	done; exit $$status

# Small blocks straight from the driver, so that a step over the edge leaves an allocation; first
# without the sanitizer, which fills Triton's cache of compiled kernels.
test-gpu-sanitizer:
	$(GPU_ENV) $(PYTHON) tests/gpu/sanitize.py
	$(GPU_ENV) PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(PYTHON) tests/gpu/sanitize.py \
	    --under "$(SANITIZER) --tool $(TOOL) --error-exitcode 1"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	$(BIN)/python docs/api.py runs/docs

bench: $(VENV)/.app
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.app: $(VENV)/.created pyproject.toml requirements/constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e ".[cli,plots,formats]"
	touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml requirements/constraints.txt requirements/interpreter.txt
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements/interpreter.txt
	touch $@ $(VENV)/.app
