# Two commands need no set-up of their own: `make demo` and `make test`.
SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo)

.PHONY: demo test lint types check bench nightly docs clean setup s3-server

setup: $(STAMP)

# torch comes first and by itself: a request that leaves its version open resolves to a CUDA build.
$(STAMP): pyproject.toml constraints.txt ckpt/merge/kernels.c
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

# A real S3 server for the tests (radosgw): without it they use moto's server, and skip what that cannot do.
s3-server:
	command -v radosgw && command -v ceph-mon && command -v ceph-osd || { $(AS_ROOT) apt-get update -qq && \
	$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends ceph-mon ceph-osd radosgw; }

# More random schedules of protection and recovery than the tests can afford, others each day; SECONDS says how many.
nightly: setup
	$(PY) -m tests.nightly --seconds $(or $(SECONDS),3600)

bench: setup
	$(PY) -m benchmarks

docs: setup
	$(PY) docs/build.py docs/api

clean:
	rm -rf demo-out docs/api build *.egg-info .mypy_cache .ruff_cache .hypothesis
