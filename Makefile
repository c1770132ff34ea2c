# Everything a checkout needs, from nothing: `make demo` sets up .venv/ and trains a model; the second time set-up is skipped.
# Needs Python 3.11 or newer and make. Every path is relative, so the checkout may stand in a folder with spaces.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# What was set up, and for which files and folder: set-up runs again when any of them changes, or was cut short.
STAMP := $(VENV)/automode-setup.stamp
KEY = { cat pyproject.toml constraints.txt Makefile; pwd; } | cksum

.PHONY: help setup demo test coverage nightly check format bench clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 20

setup:  ## create .venv/ with automode and its tools (skipped when nothing changed)
	@if [ -f $(STAMP) ] && [ "$$($(KEY))" = "$$(cat $(STAMP))" ] && $(PY) -c '' 2>/dev/null; then exit 0; fi; set -e; \
	echo 'Setting up $(VENV)/ (the first time this takes minutes: PyTorch is large)'; \
	rm -f $(STAMP); \
	if ! $(PY) -c '' 2>/dev/null; then \
		if [ -z '$(PYTHON)' ]; then echo 'automode needs Python 3.11 or newer; found none: make setup PYTHON=<path to one>' >&2; exit 1; fi; \
		'$(PYTHON)' -m venv --clear $(VENV); \
	elif ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo '$(VENV)/ holds a Python older than 3.11: move it away and run make again' >&2; exit 1; \
	fi; \
	$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip; \
	$(PIP) install --quiet -c constraints.txt --upgrade pip; \
	$(PIP) install --quiet -c constraints.txt torch hatchling editables; \
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable . --group dev; \
	$(KEY) > $(STAMP)

demo: setup  ## train on real data with automode on, and replay every decision
	$(PY) examples/digits_automode.py
	$(VENV)/bin/automode replay last

test: setup  ## run every test, with the coverage of those that do not repeat one another
	$(PY) -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

coverage: setup  ## the same, with the coverage of every test (a quarter longer)
	AUTOMODE_COVERAGE=all $(PY) -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

nightly: setup  ## run the tests that take too long for every time: every cut, hundreds of kills, new examples
	$(PY) -m pytest -n $(WORKERS) -m nightly $(PYTEST_ARGS)
	$(PY) -m pytest -n $(WORKERS) --hypothesis-profile=explore $$(grep -rl 'from hypothesis' tests --include='test_*.py') $(PYTEST_ARGS)

check: setup  ## lint, format, types, floors, purity
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-logo
	$(PY) -m pytest -q tests/architecture/test_purity.py

format: setup  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup  ## list the benchmarks, one command each
	@$(PY) benchmarks/__main__.py

clean:  ## remove caches and build output (neither .venv/ nor your runs)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* build dist
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## the same, and .venv/ if `make setup` made it
	@if [ -f $(STAMP) ]; then rm -rf $(VENV); elif [ -d $(VENV) ]; then echo '$(VENV) was not set up by make: left alone'; fi
