# Everything runs from a clean clone; nothing has to be activated. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
CODE := l4q exporters runtime_tests tools

# The stamp's name carries a checksum of what the environment is made from: change that, and it is brought up to date.
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' '-')

# make PYTHON=/path/to/python3.11 ... chooses another interpreter; the lock file is written for 3.11.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3) python3)

# Models and texts come from build/assets, never from a hub; no runtime reports usage.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false
# vLLM on a small CPU machine: 1 GiB of key-value cache instead of most of the memory, threads not pinned to cores that
# others use, and the engine in the worker's own process.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
export VLLM_ENABLE_V1_MULTIPROCESSING ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Turns pip's log into one line that counts: n of total fetched, then installing.
COUNT_PACKAGES = /^(Collecting|Processing|Requirement)/ { printf "\r    %d of %d", ++n, total; fflush() } \
  /^Installing/ { printf ", unpacking"; fflush() } END { print "" }

.PHONY: help venv assets judges peers browser lint format test demo reproduce compatibility docs coverage mutation minimum fuzz reliability lock clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(STAMP) ## create .venv, or bring it up to date, from requirements.lock

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "l4q needs Python 3.11 or later, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11 venv" >&2; exit 2; }
	@if [ ! -x $(BIN)/python ]; then echo "==> creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); fi
	@echo "==> installing PyTorch"
	@$(BIN)/python -m pip install --quiet --constraint requirements.lock torch
	@echo "==> installing $$(grep -c ^[a-z] requirements.lock) pinned packages (a few minutes the first time)"
	@$(BIN)/python -m pip install --no-deps --requirement requirements.lock \
	  | awk -v total=$$(grep -c ^[a-z] requirements.lock) '$(COUNT_PACKAGES)'
	@echo "==> installing l4q's commands"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@

assets: venv ## fetch and convert the real models and texts to build/assets
	@$(BIN)/python -m tools.fetch_assets

judges: venv ## install the foreign readers that tests compare with to build/judges
	@$(BIN)/python -m tools.fetch_judges

peers: venv ## install other people's exporters, for tools.bench_export, to build/peers
	@$(BIN)/python -m tools.fetch_peers

browser: ## Chromium, which looks at the pages in tests
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  if command -v $$name >/dev/null; then exit 0; fi; done; \
	if command -v apt-get >/dev/null && [ $$(id -u) = 0 ]; then \
	  echo "==> installing Chromium"; apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; \
	else echo "A test opens the parity report in Chromium: install it with your system's package manager." >&2; exit 2; fi

lint: venv ## ruff and mypy
	@echo "==> ruff"
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@echo "==> mypy"
	@$(BIN)/mypy

format: venv ## repair what ruff can repair
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

test: assets judges browser lint ## lint, then every test, with the real runtimes
	@echo "==> pytest"
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest # idle threads sleep: spinning ones starve a busy machine

demo: assets ## train, export and compare on SmolLM2-135M-Instruct; results in build/demo
	@$(BIN)/python -m tools.demo

reproduce: assets ## compare L4Q with its baselines on glassllm, 4 and 3 bits, 3 seeds; results in build/reproduce
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tools.reproduce --resume

compatibility: assets judges ## run every format in every runtime and write docs/compatibility.md
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tools.compatibility

docs: venv ## build the documentation site into build/site and check its links
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@$(BIN)/python -m tools.check_site

coverage: assets judges browser ## every test with line and branch coverage of l4q and exporters
	@rm -f .coverage .coverage.*
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m coverage run -m pytest
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

mutation: venv ## mutants of the packers and the quantizer; make mutation MUTANTS='exporters.words*' for some
	@$(BIN)/python -m pip install --quiet --no-deps --target build/mutation mutmut==3.8.1 libcst==1.9.0
	@PYTHONPATH=build/mutation $(BIN)/python -m mutmut run --max-children 1 $(MUTANTS)
	@$(BIN)/python -m tools.mutants_table

minimum: venv ## unit tests with the oldest versions that pyproject.toml admits
	@$(BIN)/python -m tools.minimum

fuzz: venv ## 100,000 damaged inputs for every parser, recorded in docs/results/fuzz.json (half an hour and more)
	@$(BIN)/python -m tools.fuzz --record

reliability: venv ## put what the last runs injected and covered into docs/reliability.md
	@$(BIN)/python -m tools.reliability --write docs/reliability.md
	@if [ -f .coverage ]; then $(BIN)/python -m tools.reliability --coverage .coverage --write docs/reliability.md; fi

lock: venv ## rewrite requirements.lock from pyproject.toml
	@$(BIN)/python -m tools.lock

clean: ## remove everything made except .venv and the downloaded assets
	@rm -rf build/demo build/reproduce dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv and build too
	@rm -rf $(VENV) build
