# Two commands matter: `make demo` and `make test`. Neither needs root, neither reinstalls.
PYTHON ?= $(shell command -v python3.11 || command -v python3.10 || echo python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
# A second environment: the newest Python, and stock ONNX Runtime where $(VENV) has the one for
# training.
STOCK_PYTHON ?= $(or $(shell scripts/newest_python),$(PYTHON))
STOCK        ?= .venv-stock
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test stock test-stock lint types check clean help

help:
	@echo "make demo   export, serve and train 20 emulated devices on real watch data (under 5 minutes)"
	@echo "make test   the whole test suite with coverage, on both ONNX Runtimes"
	@echo "make check  lint, types and import contracts"
	@echo "make stock  $(STOCK): the newest Python here, with stock ONNX Runtime"
	@echo "make test-stock  the SDK's tests in it, on artifacts that $(VENV) has exported"
	@echo "make clean  remove $(VENV), $(STOCK), runs/ and caches"

demo: $(VENV)/.sim
	$(BIN)/python -m examples.android_sim --out runs/demo $(DEMO_ARGS)

test: $(VENV)/.dev $(STOCK)/.stock
	PETALFL_STOCK=$(STOCK) $(BIN)/python -m pytest -n auto --cov --cov-report=term \
		--durations=40 $(TEST_ARGS)

stock: $(STOCK)/.stock

test-stock: $(VENV)/.dev $(STOCK)/.stock
	$(BIN)/python -m tests.reference_artifacts build/test-artifacts small several personal
	PETALFL_TEST_ARTIFACTS=$(CURDIR)/build/test-artifacts $(STOCK)/bin/python -m pytest -n auto \
		tests/petalfl tests/contract --ignore tests/contract/test_readme.py \
		--ignore tests/contract/test_embedding.py $(TEST_ARGS)

check: lint types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(STOCK) runs build .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

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

# Not petalfl[ort]: on Python 3.11 that would be the runtime for training.
$(STOCK)/.stock: pyproject.toml
	$(STOCK_PYTHON) -m venv --clear $(STOCK)
	$(STOCK)/bin/pip install --quiet --editable ".[test]"
	$(STOCK)/bin/pip install --quiet --upgrade onnxruntime
	touch $@
