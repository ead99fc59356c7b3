# `make` lists the targets. A fresh machine needs make and python3 (3.11 or newer) with its venv module, no more.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCHMARKS ?= $(sort $(wildcard benchmarks/[a-z]*.py))

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow bridges lint docs bench clean

PIP := -m pip install --quiet --quiet --disable-pip-version-check --no-input
TORCH := $(shell grep -E '^torch==' constraints.txt)
EXTRAS := test,lint,docs,local,diffusion,control,postgres,serve
PEERS := its_hub[lm]==1.2.0 AdaptiveConsistency==1.0.0 openai
FEW_STEPS := rectified-flow-pytorch==0.14.0 einops requests matplotlib
# the bounds below optillm's own keep pip from trying hundreds of old releases
OPTILLM := optillm==0.4.0 'transformers>=5.10,<5.13' 'optimum>=2' 'outlines>=1.2.3'
CLIENTS := openai litellm lm_eval[api] pytest pytest-asyncio
INPUTS := pyproject.toml constraints.txt

# $(call environment,FOLDER): an empty virtual environment there, or a clear message why not.
define environment
command -v $(PYTHON) >/dev/null || { \
  echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "error: $$($(PYTHON) --version) is too old, 3.11 or newer is needed; name another: make PYTHON=python3.12" >&2; exit 1; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
  echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
$(1)/bin/python -m pip --version >/dev/null 2>&1 || { echo "making $(1)"; $(PYTHON) -m venv --clear $(1); }
endef

help:  ## List the targets
	@echo "Targets:"
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s@ 2>/dev/null \
	  || sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1: \2/p' $(firstword $(MAKEFILE_LIST))

venv: .venv/.ready  ## .venv: the library, its test, lint and docs tools, torch (some minutes, once)

demo: .venv-demo/.ready  ## Answer real questions with the model in the package, in the base install
	@echo "running examples/demo.py"
	@.venv-demo/bin/python examples/demo.py

test: .venv/.ready  ## Run the tests, without those marked slow (PYTEST_ARGS="-k ledger")
	@.venv/bin/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

test-slow: .venv/.ready  ## Run the tests marked slow: training, long statistical tests
	@.venv/bin/python -m pytest -n auto -m slow $(PYTEST_ARGS) || { code=$$?; [ $$code -eq 5 ] && echo "no slow tests" || exit $$code; }

bridges: .venv-bridges/.ready  ## Run the tests of other clients and frameworks, each with its real package
	@CONSILIENCE_REQUIRE_BRIDGES=1 .venv-bridges/bin/python -m pytest tests/bridges $(PYTEST_ARGS)

lint: .venv/.ready  ## ruff check, ruff format, mypy, import contracts
	@failed=; \
	echo "ruff check"; .venv/bin/ruff check --quiet . || failed="$$failed ruff-check"; \
	echo "ruff format"; .venv/bin/ruff format --diff --quiet . || failed="$$failed ruff-format"; \
	echo "mypy"; .venv/bin/mypy || failed="$$failed mypy"; \
	echo "lint-imports"; .venv/bin/lint-imports --no-cache --no-logo || failed="$$failed lint-imports"; \
	if [ -n "$$failed" ]; then echo "error: failed:$$failed" >&2; exit 1; fi

docs: .venv/.ready  ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

bench: .venv-peers/.ready .venv-few-steps/.ready  ## Run every benchmark beside its peers (BENCHMARKS=benchmarks/x.py for some)
	@failed=; for script in $(BENCHMARKS); do \
	  environment=.venv-peers; if grep -Eq '^import torch|consilience[.]diffusion' $$script; then environment=.venv-few-steps; fi; \
	  echo "== $$script"; $$environment/bin/python $$script || failed="$$failed $$script"; done; \
	if [ -n "$$failed" ]; then echo "error: failed:$$failed" >&2; exit 1; fi

clean:  ## Remove what was built: site/, demo/, caches (virtual environments stay)
	rm -rf site demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find src tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: $(INPUTS)
	@$(call environment,.venv)
	@echo "installing $(TORCH) into .venv (a large package)"
	@.venv/bin/python $(PIP) -c constraints.txt $(TORCH)
	@echo "installing consilience with extras $(EXTRAS) into .venv"
	@.venv/bin/python $(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

.venv-demo/.ready: $(INPUTS)
	@$(call environment,.venv-demo)
	@echo "installing consilience, the base install alone, into .venv-demo"
	@.venv-demo/bin/python $(PIP) -c constraints.txt -e .
	@touch $@

.venv-peers/.ready: $(INPUTS) Makefile
	@$(call environment,.venv-peers)
	@echo "installing consilience and $(PEERS) into .venv-peers"
	@.venv-peers/bin/python $(PIP) -c constraints.txt -e '.[serve]' $(PEERS)
	@touch $@

.venv-few-steps/.ready: $(INPUTS) Makefile
	@$(call environment,.venv-few-steps)
	@echo "installing consilience, azula and $(FEW_STEPS) into .venv-few-steps"
	@.venv-few-steps/bin/python $(PIP) -c constraints.txt $(TORCH)
	@.venv-few-steps/bin/python $(PIP) -c constraints.txt -e '.[diffusion,control]' $(FEW_STEPS)
	@.venv-few-steps/bin/python $(PIP) --no-deps torchvision==0.16.2 azula==0.11.1
	@touch $@

.venv-optillm/.ready: Makefile
	@$(call environment,.venv-optillm)
	@echo "installing optillm into .venv-optillm (about 3 GB); the benchmarks of consilience serve use it if it is there"
	@.venv-optillm/bin/python $(PIP) --upgrade 'pip>=25'
	@.venv-optillm/bin/python $(PIP) $(TORCH) $(OPTILLM)
	@touch $@

.venv-bridges/.ready: pyproject.toml constraints-bridges.txt Makefile
	@$(call environment,.venv-bridges)
	@echo "installing consilience with extras serve,inspect,dspy,langchain and $(CLIENTS) into .venv-bridges"
	@.venv-bridges/bin/python $(PIP) -c constraints-bridges.txt -e '.[serve,inspect,dspy,langchain]' $(CLIENTS)
	@touch $@
