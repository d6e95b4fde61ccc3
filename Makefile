# `make demo` and `make test` set themselves up; a second call finds the work done.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test check clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile
	@echo 'ARGS="..." goes to the program, or to pytest; PYTHON=... makes the environment.'

demo: $(VENV)/.installed  ## Run the whole loop on the embedded world and report on it
	@$(BIN)/selfmoa demo $(ARGS)

# One thread a worker: two that take both cores each would wait for one another.
test check: export OMP_NUM_THREADS := 1

test: $(VENV)/.installed-dev  ## Run all tests
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(VENV)/.installed-dev  ## Check style, types and layers, and run the quick tests
	@$(BIN)/ruff format --check --quiet --output-format concise
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/mypy --no-error-summary
	@told=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$told" >&2; exit 1; }
	@$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

clean:  ## Remove the environment, caches and build products; runs stay
	@rm -rf $(VENV) build dist src/*.egg-info
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests -name __pycache__ -prune -exec rm -rf {} +

# torch first and by its pin: where pip is shown a CPU build (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL)
# it takes that one, and what follows finds it there.
$(VENV)/.torch: constraints.txt | $(BIN)/pip
	@echo "installing into $(VENV); the first time takes a few minutes" >&2
	@$(PIP) install -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

# pip comes last into an environment: where it is missing, the making of it was interrupted.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "there is no $(PYTHON): install Python 3.11 or later, or name one with PYTHON=..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), selfmoa needs 3.11 or later: name one with" \
	    "PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments: install its venv module (Debian and Ubuntu:" \
	    "apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
