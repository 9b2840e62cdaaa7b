# make demo: the main job, offline. make test: everything that proves it. make bench: the ratios.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test servers lint bench docs picture clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python cloud_services.py quickstart

servers:
	./scripts/install_test_servers.sh

test: servers $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TEST)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: servers $(VENV)/.installed-dev
	$(BIN)/python benchmarks/run.py $(BENCH)

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_commands.py

picture: $(VENV)/.installed-dev
	$(BIN)/python docs/make_picture.py

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
