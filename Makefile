# `make demo` and `make test` work on a fresh machine: each makes .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check -q
PY := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(PY) -m examples.demo outputs/demo

test: lint
	$(PY) -m pytest -n 2

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) outputs
