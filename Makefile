# Every target sets up what it needs: a virtual environment with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := model pipelines serve cli
PYTEST := $(BIN)/pytest -q -n auto --maxprocesses 4

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-fast check types format clean

demo: $(INSTALLED)
	$(BIN)/diffray generate examples/prompts.csv out/demo

test: check
	$(PYTEST)

test-fast: check
	$(PYTEST) -m "not slow"

check: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mypy cannot see setuptools' import hook; links give it the same namespace.
types:
	@mkdir -p .types/diffray
	@for p in $(PACKAGES); do ln -sfn "$(CURDIR)/$$p" .types/diffray/$$p; done

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .types build *.egg-info .pytest_cache .mypy_cache .ruff_cache
