# Two commands matter: `make demo` and `make test`. Neither needs root, neither reinstalls.
PYTHON ?= $(shell command -v python3.11 || command -v python3.10 || echo python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint types check clean help

help:
	@echo "make demo   export, serve and train 20 emulated devices on real watch data (under 5 minutes)"
	@echo "make test   the whole test suite with coverage"
	@echo "make check  lint, types and import contracts"
	@echo "make clean  remove $(VENV), runs/ and caches"

demo: $(VENV)/.sim
	$(BIN)/python -m examples.android_sim --out runs/demo $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --cov --cov-report=term $(TEST_ARGS)

check: lint types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# torch goes first and pinned, so that no other package's range can pull in another build of it.
$(VENV)/.sim: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools>=77"
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --editable ".[sim]"
	touch $@

$(VENV)/.dev: $(VENV)/.sim
	$(BIN)/pip install --editable ".[dev]"
	touch $@
