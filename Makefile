# Two commands on a bare machine (Python 3.11+ and a C++ compiler): `make demo` and `make test`.

PYTHON ?= python3
BIN    := .venv/bin
DEMO   := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo test lint format clean

setup: .venv/.ready

# Rebuilt when the package's metadata or its native code changes.
.venv/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/regrow/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[corpus,plot,cluster,test,lint]'
	touch $@

# Pre-train a small always-sparse BERT on real text, then ask it for a word.
demo: setup
	$(BIN)/regrow pretrain --preset demo --output $(DEMO)
	$(BIN)/python examples/fill_mask.py $(DEMO)

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
