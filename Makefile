# make demo   installs, trains a tiny model on the sprite world and writes a video (minutes, no accelerator)
# make test   installs, then lint, tests and notebooks: what continuous integration runs
# make lint | unit | notebooks | test-slow | requirements | clean

PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done))
BIN := .venv/bin
WORKERS ?= 2
NOTEBOOKS := $(patsubst notebooks/%.py,.cache/notebooks/%.ipynb,$(wildcard notebooks/*.py))

export JAX_PLATFORMS ?= cpu
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format unit notebooks test-slow requirements clean
.DELETE_ON_ERROR:

demo: .venv/.base
	$(BIN)/python -m vidgen.cli.main demo --out demo/

# Side by side: lint and notebooks use one core each.
test:
	$(MAKE) --jobs=3 --output-sync=line lint unit notebooks

lint: .venv/.parity
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/pyright

format: .venv/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

unit: .venv/.parity
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal --durations=15

# Compiled quickly, as the tests are, whose compiled programs it shares.
notebooks: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
notebooks: $(NOTEBOOKS)
	XLA_FLAGS="$$($(BIN)/python tests/xla_flags.py)" VIDGEN_VARIANT=tiny $(BIN)/python -m pytest --timeout=900 --nbmake --nbmake-timeout=900 $(NOTEBOOKS)

# Minutes each: compiling for TPU topologies, and kernels interpreted at full block sizes.
test-slow: .venv/.dev
	$(BIN)/python -m pip install --quiet -e ".[tpu]"
	$(BIN)/python -m pytest -m slow

.cache/notebooks/%.ipynb: notebooks/%.py .venv/.dev
	@mkdir -p $(@D)
	$(BIN)/jupytext --quiet --to ipynb --output $@ $<

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# A stamp per set of pins: a second run installs nothing, a changed pin installs again.
.venv/.base: requirements/base.txt pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --no-compile -r requirements/base.txt
	$(BIN)/python -m pip install -qq --no-deps -e .
	@touch $@

.venv/.dev: requirements/dev.txt pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --no-compile -r requirements/dev.txt
	$(BIN)/python -m pip install -qq --no-deps -e .
	@touch $@ .venv/.base

# PyTorch and what is built on it: references that tests compare with, never imported by the package.
.venv/.parity: requirements/parity.txt | .venv/.dev
	$(BIN)/python -m pip install --quiet --no-compile -r requirements/parity.txt
	@touch $@

PIN := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links --output-file
requirements: | .venv/.dev
	$(PIN) requirements/base.txt pyproject.toml
	$(PIN) requirements/dev.txt --extra dev --extra bench -c requirements/base.txt pyproject.toml
	$(PIN) requirements/parity.txt --extra parity -c requirements/base.txt -c requirements/dev.txt pyproject.toml
	@# PyTorch's own dependencies on CUDA are left to pip: its builds for CPU have none.
	@sed -i -E '/^(nvidia-|cuda-|triton==)/d' requirements/parity.txt
	@for set in base dev parity; do \
	  sed -i '1i # Pinned by `make requirements` from pyproject.toml, for Python 3.11 and newer.' requirements/$$set.txt; done

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .import_linter_cache build demo *.egg-info
