# The commands of the README. Each works alone on a machine with Python 3.11 to 3.13, make and git.

SHELL := /bin/bash
.DEFAULT_GOAL := help

BIN := .venv/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$p && break; done)
# PYTHONWARNINGS: setuptools warns at length that an editable install is editable.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt

# A stamp says what .venv holds; `dev` holds all of `train`, so its stamp counts as both.
PINS := pyproject.toml constraints.txt
TRAIN := .venv/.installed-train
DEV := .venv/.installed-dev
SERVE := .venv/.installed-serve
BUNDLE := saved_models/movielens-100k/bundle

.PHONY: help setup setup-train demo serve test check docs bench bench-train bench-pretrain bench-index bench-text \
	bench-serve clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

demo: $(TRAIN) ## set up what training needs, then the main job on MovieLens-100K, and a bundle of it
	$(BIN)/tfrec run movielens-100k
	$(BIN)/tfrec export saved_models/movielens-100k --to $(BUNDLE) --no-saved-models

serve: $(SERVE) ## answer requests with the bundle that `make demo` left, and show the page
	@test -d $(BUNDLE) || { echo "make: there is no bundle yet; run: make demo"; exit 2; }
	$(BIN)/tfrec serve $(BUNDLE)

test: $(DEV) ## set up everything, then run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

check: $(DEV) ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV) ## write the generated pages of docs/ again
	$(BIN)/python docs/generate.py

bench: $(DEV) ## measure everything that docs/benchmarks quotes (hours on two cores)
	@set -e; for script in benchmarks/*.py; do $(BIN)/python "$$script"; done

bench-train: $(TRAIN) ## training throughput beside RecTools (makes it an environment of its own)
	$(BIN)/python benchmarks/train_throughput.py $(BENCH)

bench-pretrain: $(TRAIN) ## pretraining beside RecTools' BERT4Rec, encoding beside a plain tf.function
	$(BIN)/python benchmarks/train_throughput.py --masked $(BENCH)
	$(BIN)/python benchmarks/encode.py $(BENCH)

bench-index: $(TRAIN) ## the vector index beside hnswlib and faiss: make bench-index BENCH="--raw DIR"
	$(BIN)/python benchmarks/index.py $(BENCH)

bench-text: $(TRAIN) ## the int8 text encoder beside TensorFlow and onnxruntime (installs the latter apart)
	$(BIN)/python benchmarks/text_int8.py $(BENCH)

bench-serve: $(DEV) ## the server beside TensorFlow in FastAPI: make bench-serve BENCH="--bundle DIR"
	$(BIN)/python benchmarks/serving.py $(BENCH)

setup: $(DEV) ## .venv with everything

setup-train: $(TRAIN) ## .venv with what training needs

clean: ## remove .venv and caches; runs in saved_models/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11, 3.12 or 3.13 with venv is needed" \
		"(Debian: apt install python3 python3-venv); or say which: make PYTHON=/path/to/python3.11"; exit 3; }
	@$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-input -c constraints.txt --upgrade pip || { rm -rf .venv; exit 3; }

$(TRAIN): .venv/bin/python $(PINS)
	@echo "installing the pinned packages for training (about 2 GB, one to three minutes) ..."
	$(PIP) -e '.[train]'
	@touch $@

$(DEV): .venv/bin/python $(PINS)
	@echo "installing the pinned packages for training and development ..."
	$(PIP) -e '.[dev]'
	@touch $(TRAIN) $(SERVE) $@

$(SERVE): .venv/bin/python $(PINS)
	@echo "installing the pinned packages for serving ..."
	$(PIP) -e '.[serve]'
	@touch $@
