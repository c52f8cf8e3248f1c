# make demo   train on real photos that come with the package, see a report, predict on files
# make test   pass the tests
# make quick  pass those that take no time
# make check  lint and types
# make docs   build the documentation as a site, in site/
# make install  only the environment for these, .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test quick check docs install clean

demo: $(VENV)/.demo
	@test ! -e $(DEMO) || { echo "$(DEMO) is there from an earlier demo: removing it"; rm -rf $(DEMO); }
	$(BIN)/reslearn train fashion-sample --model resnet20 --out $(DEMO)
	$(BIN)/reslearn predict $(DEMO) examples/clothes
	@echo "open $(DEMO)/report.html in a browser"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.dev
	$(BIN)/python tools/make_docs.py
	$(BIN)/mkdocs build --strict

install: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reslearn needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
