# The two commands of the README: `make quickstart` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-minimum audit lint types unit clean

quickstart: $(VENV)/.installed
	$(BIN)/innerloop train quickstart

test: lint types unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

unit: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 --dist worksteal

# The oldest versions that pyproject.toml allows, in an environment of their own (Python 3.10 to 3.12 have them).
test-minimum: $(VENV)-minimum/.installed
	$(VENV)-minimum/bin/python -m pip list
	$(VENV)-minimum/bin/pytest -n 2 --dist worksteal

$(VENV)-minimum/.installed: pyproject.toml constraints-minimum.txt
	$(PYTHON) -m venv $(VENV)-minimum
	$(VENV)-minimum/bin/python -m pip install --quiet -c constraints-minimum.txt -e '.[dev]'
	touch $@

# Known vulnerabilities of what is installed; asks a service on the network. See docs/reliability.md.
audit: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "making the environment $(VENV), once: PyTorch is large"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-minimum build dist .mypy_cache .ruff_cache .pytest_cache
