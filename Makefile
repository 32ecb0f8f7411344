# Verbs: make setup | serve | test | check | bench | fuzz | clean | help. Each does the set-up it needs; CI runs the same ones.
.DEFAULT_GOAL := help
SHELL := bash
VENV := .venv
RUN := $(VENV)/bin
ARGS :=
export MAKECMDGOALS

# What an editable install must be redone for; edits to Python need nothing.
NATIVE := $(shell find native -type f -not -name '*.md') octavo/runtime/native/build.py
INPUTS := pyproject.toml $(wildcard setup.py MANIFEST.in) $(NATIVE) tools/setup.sh

.PHONY: setup serve test check bench soak-scheduler soak fuzz clean help

setup: $(VENV)/.installed  ## make .venv and install Octavo into it

serve: $(VENV)/.installed  ## serve the default model on 127.0.0.1:8000 (ARGS="MODEL --port 9000 ..." is passed on)
	@$(RUN)/octavo serve $(ARGS)

test: $(VENV)/.installed-dev  ## run the tests, two files at a time (ARGS="tests/unit -k name" runs those, one at a time)
	@$(RUN)/python -m pytest $(or $(ARGS),--numprocesses 2 --dist loadfile)

check: $(VENV)/.installed-dev  ## format, lint, types, ceilings, who may import whom
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@$(RUN)/python tools/ceilings.py
	@$(RUN)/python tools/readme_numbers.py --check
	@$(RUN)/python -m pytest tests/unit/test_import_rules.py

bench: $(VENV)/.installed  ## the CPU workloads over HTTP, as a table and lab/results/*.json (ARGS="--peers all" is passed on)
	@$(RUN)/python -m lab.cpu $(ARGS)

soak-scheduler: $(VENV)/.installed-dev  ## a million random steps of scheduler and KV cache (ARGS="--steps N --seed N --resume")
	@$(RUN)/python tools/soak_scheduler.py $(ARGS)

fuzz: $(VENV)/.installed-dev  ## 100,000 mutated requests to a real server (ARGS="--requests N --seed N --first N")
	@$(RUN)/python tools/fuzz_server.py $(ARGS)

soak: $(VENV)/.installed-dev  ## a real server for 30 minutes, 1,000 streams at once, 100,000 mutated requests (ARGS="--minutes N")
	@$(RUN)/python tools/soak_server.py $(ARGS)
	@$(RUN)/python tools/fuzz_server.py

clean:  ## remove .venv and everything built (the model cache stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find octavo -name '*.so' -delete -o -name '*.dylib' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.installed: $(INPUTS)
	@bash tools/setup.sh $(VENV) base

$(VENV)/.installed-dev: $(INPUTS)
	@bash tools/setup.sh $(VENV) dev
