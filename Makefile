# `make demo` and `make test` on a fresh clone need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-all check format clean

demo: $(STAMP)
	$(BIN)/sparse-bitnet demo

test: $(STAMP)
	$(BIN)/pytest -m "not slow and not gpu" -n 2

test-all: $(STAMP)
	$(BIN)/pytest -m "not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: its pinned build satisfies every later requirement.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/sparse_bitnet/kernels/native/*.[chi]*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf .venv runs
