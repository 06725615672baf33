# `make quickstart` and `make test` do all their own set-up in $(VENV).
#   EXTRA        which jax to install: cpu, cuda13 or tpu
#   CONSTRAINTS  the pinned versions: constraints/newest.txt or jax-0.11.txt

PYTHON ?= python3
EXTRA ?= cpu
CONSTRAINTS ?= constraints/newest.txt
VENV ?= .venv
BIN = $(VENV)/bin
WORKDIR ?= runs/quickstart
TESTS ?= tests
WORKERS ?= 2
# Of test-interop: a Python and a PyTorch that transformers runs with.
HF_PYTHON ?= $(PYTHON)
HF_TORCH ?= torch
EXPORTS ?= runs/interop

ifeq ($(EXTRA),cpu)
# No search for accelerators, of which libtpu complains where there are none.
export JAX_PLATFORMS ?= cpu
endif

.PHONY: quickstart test test-slow test-interop lint format lock clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/installed  ## prepare, train, evaluate and sample on CPU
	$(BIN)/python scripts/quickstart.py '--workdir=$(WORKDIR)'

test: $(VENV)/plan-installed  ## the quick tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -m "not slow" $(TESTS)

test-slow: $(VENV)/plan-installed  ## the heavier tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -m slow $(TESTS)

test-interop: $(VENV)/installed .venv-interop-4/installed .venv-interop-5/installed  ## let transformers 4.57 and 5 read exports (GBs of PyTorch)
	rm -rf $(EXPORTS)
	PYTHONPATH=. $(BIN)/python tests/interop/exported.py $(EXPORTS)
	for version in 4 5; do \
	  env -u PYTHONPATH HF_HUB_OFFLINE=1 .venv-interop-$$version/bin/python \
	    tests/interop/read_by_transformers.py $(EXPORTS) \
	    tests/interop/transformers-$$version.json || exit 1; \
	done
	$(BIN)/python -m pytest tests/interop/test_transformers.py

lint: $(VENV)/installed  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/installed  ## rewrite to the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## pin the newest versions again, for both ends of the jax range
	$(PYTHON) -m uv pip compile -q --python-version 3.12 --no-annotate \
	  --no-header --no-emit-index-url --extra cpu --extra cuda13 --extra tpu \
	  --extra dev --extra plan --upgrade pyproject.toml -o constraints/newest.txt
	printf '%s==0.11.2\n' jax jax-cuda13-plugin jax-cuda13-pjrt | \
	  $(PYTHON) -m uv pip compile -q --python-version 3.12 --no-annotate \
	  --no-header --no-emit-index-url --extra cpu --extra cuda13 --extra tpu \
	  --extra dev --extra plan --upgrade --constraint - pyproject.toml -o constraints/jax-0.11.txt

clean:  ## remove the environments
	rm -rf $(VENV) .venv-interop-4 .venv-interop-5

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but xlstm_jax" \
	    "needs Python 3.12 or newer; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[$(EXTRA),dev]'
	@touch $@

$(VENV)/plan-installed: $(VENV)/installed
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[$(EXTRA),dev,plan]'
	@touch $@

.venv-interop-4/installed: TRANSFORMERS = 4.57.*
.venv-interop-5/installed: TRANSFORMERS = 5.*
.venv-interop-%/installed:
	$(HF_PYTHON) -m venv .venv-interop-$*
	.venv-interop-$*/bin/python -m pip install -q '$(HF_TORCH)' \
	  'transformers==$(TRANSFORMERS)' 'lm-eval[hf]==0.4.*'
	@touch $@
