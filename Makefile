# Two commands do the main jobs on a bare machine: `make train` and `make test`.
# Each makes .venv, installs the pinned versions into it, then does its job.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV ?= .venv
PY := $(VENV)/bin/python
# What tests need; EXTRAS=dev leaves PyTorch out, and the tests that need it skip.
EXTRAS ?= dev,torch,referees
# Extra arguments: make train ARGS="--steps 100"
ARGS ?=

.PHONY: help setup train test test-all lint format clean

help:
	@echo "make train      set up, then train the nano preset (minutes); ARGS=\"...\" adds flags"
	@echo "make test       set up, then run the tests, without the slow ones (minutes); ARGS=\"...\" goes to pytest"
	@echo "make test-all   set up, then run every test, as CI does"
	@echo "make lint       ruff, codespell and mypy"
	@echo "make setup      make $(VENV) and install the project with what tests need"

# The stamps record what was installed, so that set-up runs again only when these files change, when other
# EXTRAS are asked for, and when the environment is not whole.
$(shell "$(PY)" -c pass 2>/dev/null && test ! -e "$(VENV)/.installing" || rm -f "$(VENV)/.core" "$(VENV)/.dev")
ifneq ($(origin EXTRAS),file)
$(shell { read -r was < "$(VENV)/.dev" && test "$$was" = "$(EXTRAS)"; } 2>/dev/null || rm -f "$(VENV)/.dev")
endif

INSTALL = "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	"error: no Python 3.11 or newer found; install one, or: make PYTHON=/path/to/python3" >&2; exit 2; }; \
	"$(PYTHON)" tools/install.py $(VENV)

$(VENV)/.core: pyproject.toml setup.py constraints.txt
	@$(INSTALL)
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py constraints.txt
	@$(INSTALL) "$(EXTRAS)"
	@touch $(VENV)/.core
	@echo "$(EXTRAS)" > $@

setup: $(VENV)/.dev

train: $(VENV)/.core
	@$(PY) -m mlx_mla.train $(ARGS)

test: $(VENV)/.dev
	@$(PY) -m pytest -n 2 -m "not slow" --durations=25 $(ARGS)

test-all: $(VENV)/.dev
	@$(PY) -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@git ls-files -z | xargs -0 $(abspath $(PY)) -m codespell_lib
	@$(PY) -m mypy

format: $(VENV)/.dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
