# Every target makes .venv and installs what it needs; nothing else has to be there but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
TESTS := $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: train test check bench clean

# On Linux, glibc then asks for huge pages, without which a processor spends a quarter of a step on looking up addresses.
train: .venv/installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/memzoo train quickstart

test: .venv/installed
	$(BIN)/ruff check .
	$(TESTS)

check: .venv/installed
	$(BIN)/ruff check .
	$(TESTS) -m "not slow"

bench: .venv/installed
	$(BIN)/memzoo bench

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'memzoo needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf .venv
