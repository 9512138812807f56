# `make demo`: set-up and the main job on the embedded model.   `make test`: set-up and the tests.
# `make test-all`: the tests with every case of their grids and more random cases.
# `make docs`: the documentation as a site in site/, to be opened without a server or network.
# `make test-oldest`: the tests of model families with the oldest supported versions, in an environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PYTEST := $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

.PHONY: demo test test-all test-oldest docs check format clean

demo: $(READY)
	$(BIN)/llmprune run demo --sparsity 0.7 --output runs/demo-0.7 --overwrite

test: $(READY)
	$(PYTEST) -m 'not exhaustive'

test-all: $(READY)
	$(PYTEST)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open $(CURDIR)/site/index.html"

# The index's build of this torch may be the one for GPUs, several GB with its libraries; the environment variable
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu finds a small one.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n auto $(addprefix tests/test_,model_survey.py model_families.py model_structure.py \
		model_conversion.py checkpoint_dequantised.py)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e . pytest pytest-xdist hypothesis
	touch $(OLDEST)/.ready

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
	rm -rf $(VENV) $(OLDEST) runs site build dist .pytest_cache .mypy_cache .ruff_cache
