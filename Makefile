# Every target makes .venv when it is missing and installs the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint check format tables

# make demo QUICK=1: one epoch on a part of the data
demo: $(INSTALLED)
	$(BIN)/loretta demo $(if $(QUICK),--quick)

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Fill the tables of README and docs from benchmarks/results/ (cp runs/demo/demo.json there after a demo)
tables: $(INSTALLED)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/counts.py

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,examples]'
	touch $(INSTALLED)
