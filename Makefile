# Each target makes the environment it needs; repeated calls skip pip while pyproject.toml is unchanged.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test quality soak pictures env clean

demo: .venv/.installed
	$(BIN)/smart demo

test: env
	$(BIN)/python -m pytest

quality: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A server under load with faults, for ten minutes (SECONDS_=60 is the short form).
soak: env
	$(BIN)/python tools/soak.py --seconds $(or $(SECONDS_),600)

# Trains smart-pictures-135m anew (hours on two cores; stopped, it goes on where it was).
pictures: env
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m smart_decoding.training.pictures --output build/pictures

env: .venv/.installed-dev

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (Debian: apt install python3 python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "venv is missing (Debian: apt install python3-venv)"; exit 1; }

.venv/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) install -e '.[test,dev,bench]'
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
