# The targets create .venv and install what they need. Only Python >= 3.11 must be there already.
PYTHON ?= python3
BIN := .venv/bin
TESTS := $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: train test check bench docs docs-serve clean

# The tunable makes glibc on Linux request huge pages. Without them a quarter of a step is spent on looking up addresses.
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

# Into docs/site. Material for MkDocs prints an advertisement unless the variable is set.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs.yml

docs-serve: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --config-file docs/mkdocs.yml

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'memzoo needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf .venv
