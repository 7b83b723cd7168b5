# Two commands need no set-up of their own: `make demo` and `make test`.
SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test lint types check bench docs clean setup

setup: $(STAMP)

# torch comes first and by itself: a request that leaves its version open resolves to a CUDA build.
$(STAMP): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

demo: setup
	$(PY) examples/demo.py --out demo-out

test: lint types check

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

check: setup
	$(PY) -m pytest

bench: setup
	$(PY) -m benchmarks

docs: setup
	$(PY) docs/build.py docs/api

clean:
	rm -rf demo-out docs/api build *.egg-info .mypy_cache .ruff_cache .hypothesis
