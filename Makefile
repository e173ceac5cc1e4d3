# Two commands do the main jobs on a bare machine: `make train` and `make test`.
# Each makes .venv, installs the pinned versions into it, then does its job.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python3.10; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Extra arguments: make train ARGS="--steps 100"
ARGS ?=

.PHONY: help setup train test test-all lint format clean

help:
	@echo "make train      set up, then train the nano preset (minutes); ARGS=\"...\" adds flags"
	@echo "make test       set up, then run the tests, without the slow ones (minutes); ARGS=\"...\" goes to pytest"
	@echo "make test-all   set up, then run every test, as CI does"
	@echo "make lint       ruff and mypy"
	@echo "make setup      make $(VENV) and install the project with what tests need"

# The stamps record what was installed, so that set-up runs again only when these files change.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer found; install one, or: make PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 2; }
	@touch $@

$(VENV)/.core: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing mlx_mla into $(VENV) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing the tools for tests into $(VENV) ..."
	@$(PIP_INSTALL) -e '.[dev,torch]'
	@touch $@

setup: $(VENV)/.dev

train: $(VENV)/.core
	@$(PY) -m mlx_mla.train $(ARGS)

test: $(VENV)/.dev
	@$(PY) -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	@$(PY) -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(VENV)/.dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
