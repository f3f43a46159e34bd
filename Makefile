# One environment, .venv; each target makes it when it is missing and then runs. The stamp inside it is newer than
# pyproject.toml once the installation has succeeded, so a second run installs nothing. What only test-ecosystem and docs
# need is large and is added by them, with a stamp each.
#   make demo            make test PYTEST_ARGS='-k genotype -x'            make PYTHON=python3.12 demo
# With LOWEST=yes a target runs in an environment that holds every direct dependency in the lowest version that
# pyproject.toml allows: make LOWEST=yes test-slow. What the extras ecosystem and docs ask for is higher: one of their own.

PYTHON ?= python3
LOWEST ?=
ifeq ($(LOWEST),)
VENV := .venv
else
VENV := .venv-lowest$(if $(filter test-ecosystem docs,$(MAKECMDGOALS)),-extras)
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ECOSYSTEM := $(VENV)/.installed-ecosystem
DOCS := $(VENV)/.installed-docs
# Few processes, for a machine of many cores would otherwise start one each; see tests/conftest.py for their threads.
PYTEST_ARGS ?= -n logical --maxprocesses 4 --dist worksteal --durations 10
MODELS ?=
# For test-copies. It has wheels for Python up to 3.11.
OLD_TORCH ?= 2.1.2
COPIES := .venv-torch-$(OLD_TORCH)
# A clone of timm's repository for test-timm-scripts, which otherwise clones it.
TIMM_REPO ?=
BENCH_ARGS ?= --quick
DEMO_ARGS ?= --out demo_out
COMMA := ,

.DEFAULT_GOAL := help
.PHONY: help demo demo-search test test-lowest test-slow test-copies test-ecosystem test-timm test-timm-scripts docs lint format bench gpu gpu-compile build install clean

# $(call installed,EXTRAS): install the package with these. Only uv resolves to the lowest versions, and it compiles only if
# asked to, which otherwise every process does again where Python may write no bytecode.
ifeq ($(LOWEST),)
installed = $(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(1)]'
else
installed = $(BIN)/python -m pip install --disable-pip-version-check uv && \
	{ $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --resolution lowest-direct --editable '.[$(1)]' || { \
		echo "The lower bounds may have no wheels for $$($(BIN)/python -V): try an older one, with 'make clean' before," \
			"as in make PYTHON=python3.11 test-lowest" >&2; exit 1; }; }
endif

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install the package for its tests (the other targets do it themselves)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
		echo "No '$(PYTHON)' here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "sase-blocks needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
			"Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): some minutes the first time, PyTorch for Linux is large"
	$(call installed,dev)
	@touch $@

$(ECOSYSTEM) $(DOCS): $(VENV)/.installed-%: $(STAMP)
	@echo "Installing what the extra '$*' of pyproject.toml names into $(VENV)"
	$(call installed,dev$(COMMA)$*)
	@touch $@

demo: $(STAMP)  ## train four small networks on real digits, some minutes on 2 cores; writes demo_out/
	$(BIN)/sase-blocks demo $(DEMO_ARGS)

demo-search: $(STAMP)  ## search a network for digits, some minutes on 2 cores; writes demo_search_out/
	$(BIN)/sase-blocks search trionet --demo --out demo_search_out

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m 'not slow and not ecosystem and not gpu' $(PYTEST_ARGS)

test-lowest:  ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) LOWEST=yes test

test-slow: $(STAMP)  ## run the tests marked slow: more kinds, kills and processes
	$(BIN)/python -m pytest -m 'slow and not gpu' $(PYTEST_ARGS)

$(COPIES)/.installed:
	$(PYTHON) -m venv $(COPIES)
	$(COPIES)/bin/python -m pip install --disable-pip-version-check torch==$(OLD_TORCH) 'numpy<2' || { \
		echo "torch $(OLD_TORCH) may have no wheels for $$($(PYTHON) -V): try PYTHON=python3.11" >&2; exit 1; }
	@touch $@

test-copies: $(STAMP) $(COPIES)/.installed  ## run copied blocks with an older torch, or with another one: OLD_TORCH=2.3.1
	OLD_TORCH_PYTHON=$(COPIES)/bin/python $(BIN)/python -m pytest tests/test_copy.py -k older_torch

test-ecosystem: $(ECOSYSTEM)  ## run the tests with other libraries: segmentation, detection, transformers, the Hub, ...
	$(BIN)/python -m pytest -m 'ecosystem and not gpu' $(PYTEST_ARGS)

test-timm: $(STAMP)  ## run timm's own model tests for ours: make test-timm MODELS='resnet50_sase resnet20_cifar'
	$(BIN)/python tests/timm_upstream.py $(MODELS)

test-timm-scripts: $(STAMP)  ## run timm's train, validate, benchmark and onnx_export: TIMM_REPO=DIR, or it clones
	$(BIN)/python tests/timm_scripts.py $(if $(TIMM_REPO),--repo '$(TIMM_REPO)')

docs: $(DOCS)  ## build the documentation into site/, a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## time the blocks against one copy of their input: make bench BENCH_ARGS='--help'
	$(BIN)/python benchmarks/blocks.py $(BENCH_ARGS)

# With BIN=DIR from the command line any Python that has what is needed, with no installation: make gpu BIN=/usr/bin
gpu: $(if $(filter command,$(firstword $(origin BIN))),,$(STAMP))  ## on a CUDA device: its tests, then benchmarks, up to ten minutes; writes gpu_out/
	$(BIN)/python3 benchmarks/gpu.py --out gpu_out

gpu-compile: $(if $(filter command,$(firstword $(origin BIN))),,$(STAMP))  ## on a CUDA device: the benchmarks of compiled code, longer; adds to gpu_out/
	$(BIN)/python3 benchmarks/gpu.py --out gpu_out --compile

build: $(STAMP)  ## build the wheel and the source distribution into dist/
	rm -rf dist
	$(BIN)/python -m build

clean:  ## remove what the targets made, the environment too
	rm -rf .venv .venv-lowest .venv-lowest-extras .venv-torch-* .timm-tests dist build site demo_out demo_search_out gpu_out .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
