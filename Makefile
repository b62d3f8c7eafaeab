# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# TORCH_INDEX=https://... picks a wheel index, for example one with CPU builds of PyTorch.
PIP_FLAGS := -c requirements/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test lint format bench clean
help:
	@echo "make demo    train a network on synthetic streets and look at the result"
	@echo "make test    run the tests"
	@echo "make lint    ruff and the type checker"
	@echo "make bench   time layers and networks on this machine"

demo: $(VENV)/.app
	$(BIN)/torchsparse demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

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

$(VENV)/.dev: $(VENV)/.created pyproject.toml requirements/constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e ".[dev]"
	touch $@ $(VENV)/.app
