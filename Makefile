# Everything here needs only Python (3.10 or newer) and make: `make`, or `make help`, lists the targets.

PYTHON ?= python3
PYTEST_ARGS ?=
# of the order of the tests and of everything random in them; another one must pass too
PYTEST_SEED ?= 1
# one process per core, each with one thread: several with several threads fight over the cores
PYTEST_ENV = OMP_NUM_THREADS=1
PYTEST_SPREAD = -n auto --dist worksteal
PYTEST_SEEDS = --randomly-seed=$(PYTEST_SEED) --hypothesis-seed=$(PYTEST_SEED)
RUN_TESTS = -m pytest $(PYTEST_SPREAD) $(PYTEST_SEEDS)
# what meets little of transformers has been tested on 4.57.6
PYTEST_ON_5 = -m "not slow and not gpu and not version_independent"
PYTEST_THOROUGH = -m "not gpu" --timeout=3600
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-5 test-thorough test-cross test-all test-upstream quality lint types style docs dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: .venv/.ready ## train a small highway on handwritten digits and write what it does to demo_output/
	.venv/bin/lgvit demo --output demo_output $(DEMO_ARGS)

test: .venv/.ready ## run all tests and docstring examples on transformers 4.57.6
	$(PYTEST_ENV) .venv/bin/python $(RUN_TESTS) $(PYTEST_ARGS)

test-5: .venv-5/.ready ## those that depend on transformers, and a few of the others, on the newest transformers 5
	$(PYTEST_ENV) .venv-5/bin/python $(RUN_TESTS) $(PYTEST_ON_5) $(PYTEST_ARGS)

test-thorough: .venv/.ready .venv-5/.ready ## before a release: slow tests too, random ones twenty times as long, all on both
	LGVIT_TESTS=thorough $(PYTEST_ENV) .venv/bin/python $(RUN_TESTS) $(PYTEST_THOROUGH) $(PYTEST_ARGS)
	LGVIT_TESTS=thorough $(PYTEST_ENV) .venv-5/bin/python $(RUN_TESTS) $(PYTEST_THOROUGH) $(PYTEST_ARGS)

# started from one of them, which sends what it saves to the other, and back
test-cross: .venv/.ready .venv-5/.ready ## checkpoints of each loaded by the other
	LGVIT_OTHER_PYTHON=$(CURDIR)/.venv-5/bin/python $(PYTEST_ENV) .venv/bin/python -m pytest -n 2 tests/test_cross_version.py -k "elsewhere"

test-all: test test-5 test-cross ## all of these

test-upstream: .venv/upstream/.ready .venv-5/upstream/.ready ## transformers' own tests of its models, on ours
	TRANSFORMERS_TESTS=.venv/upstream $(PYTEST_ENV) .venv/bin/python $(RUN_TESTS) tests/upstream $(PYTEST_ARGS)
	TRANSFORMERS_TESTS=.venv-5/upstream $(PYTEST_ENV) .venv-5/bin/python $(RUN_TESTS) tests/upstream $(PYTEST_ARGS)

quality: lint types ## lint, formatting, direction of imports, words and types; changes nothing

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/python tests/retired_words.py

types: .venv/.ready
	.venv/bin/mypy

style: .venv/.ready ## mend what ruff can mend, then say what is left
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .
	.venv/bin/ruff check .

# without --quiet, which would hide the warnings from --strict
docs: .venv-docs/.ready ## build the site in site/; dead links and anchors fail
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@if grep -rnE '<(script|img|iframe|source)[^>]* src="(https?:)?//|<link[^>]* href="(https?:)?//' --include='*.html' site; \
		then echo "the site must load nothing from elsewhere"; exit 1; fi
	@echo "open site/index.html"

dist: .venv-dist/.ready ## build the sdist and, from it, the wheel in dist/, and check both
	rm -rf dist
	.venv-dist/bin/python -m build --no-isolation --quiet
	.venv-dist/bin/twine check --strict dist/*

clean: ## remove the environments, the demo's output, the site and every cache
	rm -rf .venv .venv-5 .venv-docs .venv-dist demo_output site build dist *.egg-info
	rm -rf .ruff_cache .hypothesis .import_linter_cache
	find . -type d \( -name __pycache__ -o -name .pytest_cache \) -prune -exec rm -rf {} +

# An environment is ready once its stamp stands: the stamp goes first and comes back last, and where there is none the
# environment is made from scratch, so an install that was interrupted is never taken for a whole one.
.venv/.ready: EXTRAS = dev,optimum
.venv/.ready: pyproject.toml .ci/constraints.txt
# Optimum does not go with transformers 5
.venv-5/.ready: EXTRAS = dev
.venv-5/.ready: pyproject.toml .ci/constraints-5.txt

.venv/.ready .venv-5/.ready:
	@echo "setting up $(@D) with the versions of $(filter .ci/%,$^) (minutes, the first time)"
	@test -f $@ || $(PYTHON) -m venv --clear $(@D)
	@rm -f $@
	@$(@D)/bin/python -m pip install -qq --upgrade pip
	@$(@D)/bin/python -m pip install -qq -c $(filter .ci/%,$^) -e ".[$(EXTRAS)]"
	@touch $@

# Tools that read the sources: neither the package nor torch is installed beside them.
.venv-docs/.ready: .ci/requirements-docs.txt
.venv-dist/.ready: .ci/requirements-dist.txt

.venv-docs/.ready .venv-dist/.ready:
	@echo "setting up $(@D) with $<"
	@test -f $@ || $(PYTHON) -m venv --clear $(@D)
	@rm -f $@
	@$(@D)/bin/python -m pip install -qq --upgrade pip
	@$(@D)/bin/python -m pip install -qq -r $<
	@touch $@

# The wheel of transformers has no tests: they come from the package index, in the version that is installed.
.venv/upstream/.ready: .venv/.ready tests/upstream/download.py
.venv-5/upstream/.ready: .venv-5/.ready tests/upstream/download.py

.venv/upstream/.ready .venv-5/upstream/.ready:
	@$(firstword $(subst /, ,$@))/bin/python tests/upstream/download.py $(@D)
	@touch $@
