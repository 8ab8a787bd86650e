# Everything a contributor types. `make` alone lists the targets.

# Looked up when a recipe runs, that is after setup: the Python this checkout works with.
PYTHON = $(shell scripts/python.sh)
# With its programs (vllm, mypy, ...) first in the path.
RUN = PATH="$(patsubst %/,%,$(dir $(PYTHON))):$$PATH"

# Tests marked `gpu` are left out where there is none.
MARKS = $(if $(shell command -v nvidia-smi),,-m "not gpu")
# A file's tests share engines, so that a file is the unit; most of an engine's start is one thread's.
WORKERS = -n 2 --dist loadfile
# For example: make test ARGS="-k pool -x", or in one process: make test WORKERS=
ARGS =

.DEFAULT_GOAL := help
.PHONY: help setup test test-fast check check-lint check-format check-types check-imports bench demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## create or update the environment (the first time takes minutes)
	@scripts/setup.sh

test: setup ## run all tests, those with a real engine too
	$(RUN) python -m pytest $(WORKERS) $(MARKS) $(ARGS)

test-fast: setup ## run the unit, property and contract tests
	$(RUN) python -m pytest $(WORKERS) $(MARKS) tests/unit tests/property tests/contract $(ARGS)

check: check-lint check-format check-types check-imports ## lint, formatting, types, import rules

check-lint: setup
	$(RUN) ruff check .

check-format: setup
	$(RUN) ruff format --check .

check-types: setup
	$(RUN) mypy

check-imports: setup
	$(RUN) lint-imports

bench: setup ## run the benchmarks into bench-results/
	$(RUN) python -m benchmarks --out bench-results $(ARGS)

demo: setup ## show a shared prefix being reused, into demo-results/
	$(RUN) python -m examples.prefix_reuse --out demo-results $(ARGS)

clean: ## remove build artefacts, results and caches (not .venv)
	rm -rf build dist *.egg-info bench-results demo-results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find kvbm_core kvbm_connectors -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
