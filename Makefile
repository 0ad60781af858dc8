# Everything happens in .venv and in this folder; nothing outside is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export DAGSTER_HOME ?= $(CURDIR)/dagster_home

.PHONY: help install demo ui test test-fast test-gpu lint clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "Python 3.11 or 3.12 is needed; name one: make install PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off --compile -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## the environment in .venv, with every version pinned

demo: install  ## sample traces -> dataset -> adapter -> report, on a CPU, without a network
	HF_HUB_OFFLINE=1 $(BIN)/triton-sft refresh

ui: install  ## the Dagster UI on http://localhost:3000
	$(BIN)/dagster dev

test: install  ## every test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-fast: install  ## the tests that take less than five seconds each
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not slow'

test-gpu: install  ## what only a GPU can show
	TRITON_SFT_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

lint: install  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove what runs made; .venv stays
	rm -rf storage dagster_home/storage dagster_home/history dagster_home/schedules dagster_home/logs
