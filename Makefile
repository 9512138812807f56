# `make demo`: set-up and the main job on the embedded model.   `make test`: set-up and the tests.
# `make test-all`: the tests with every case of their grids and more random cases.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PYTEST := $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

.PHONY: demo test test-all check format clean

demo: $(READY)
	$(BIN)/llmprune run demo --sparsity 0.7 --output runs/demo-0.7 --overwrite

test: $(READY)
	$(PYTEST) -m 'not exhaustive'

test-all: $(READY)
	$(PYTEST)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its exact version: that is the build the constraints were tested with.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "llmprune needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
