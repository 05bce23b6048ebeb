# `make demo` and `make test` work on a fresh machine: each makes .venv and installs what it needs.
# The first Python that runs and is of a version that all packages support.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check -q
PY := $(VENV)/bin/python

LIBTPU := build/libtpu

.PHONY: demo test pods lint clean

demo: $(VENV)/.core
	$(PY) -m examples.demo outputs/demo

test: lint
	$(PY) -m pytest -n 2 --dist worksteal --durations=30 -m "not alone and not pods"
	$(PY) -m pytest -m alone tests/test_train_sharding.py tests/test_benchmarks.py

pods: $(VENV)/.test $(LIBTPU)/.done
	TPU_COMPILER=$(abspath $(LIBTPU)) $(PY) -m pytest -m pods

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: install one, or name it with PYTHON=."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The demo needs no extra: the miniature is in the package.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[$*]'
	touch $@

# Beside the environment: within it JAX would look for a TPU.
$(LIBTPU)/.done: constraints.txt | $(VENV)/bin/python
	$(PIP) install --no-deps -c constraints.txt --target $(LIBTPU) --upgrade libtpu
	touch $@

clean:
	rm -rf $(VENV) $(LIBTPU) outputs
