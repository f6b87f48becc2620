# make run     a working service with a PostgreSQL of its own and a sample fleet, in .data/
# make test    everything, against a real PostgreSQL and a real RabbitMQ 4.3
#              one part: make test ONLY=checks, no-broker, 3.13, broker, a folder of tests/, a path or a test in it
# make bench   measure everything side by side with its references; writes docs/performance.md (root, about an hour)
# make mutants change the code that decides in one place at a time; prints the changes that no test notices (10 minutes;
#              one module: make mutants ONLY=authbackend/policy/decide.py)
# make fuzz    feed made-up inputs to everything that reads what others write, for a minute each; stops at what is found
#              (make fuzz SECONDS=600 ONLY=crl)
# make check   format, lint, types, layers, dead code, and the tests that need no broker
# make format  let the formatter rewrite the code
# make docs    write the generated parts of docs/ again
# make wheel   what pipx installs, in dist/
# make site    the documentation as a site, in build/site; needs npm, once
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

CHECKS := check-format check-lint check-types check-layers check-dead-code check-site
.PHONY: run test bench mutants fuzz check checks $(CHECKS) format docs site wheel clean
.DEFAULT_GOAL := check

# A missing part of Debian is named with the line that installs it.
$(VENV)/.need:
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing. Install it:  sudo apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: authbackend needs Python 3.11 or later"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3-venv is missing. Install it:  sudo apt-get install python3-venv"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# What is installed has the digests that requirements/ holds, or is refused; authbackend itself is this checkout.
INSTALL = $(BIN)/pip install --quiet --require-hashes --requirement $(1) && $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .

$(VENV)/.run: pyproject.toml requirements/run.lock | $(VENV)/.need
	@echo "installing authbackend and its dependencies into $(VENV) (about a minute)"
	@$(call INSTALL,requirements/run.lock)
	@touch $@

$(VENV)/.dev: pyproject.toml requirements/dev.lock | $(VENV)/.need
	@echo "installing authbackend and what its tests need into $(VENV) (some minutes)"
	@$(call INSTALL,requirements/dev.lock)
	@touch $@ $(VENV)/.run

run: $(VENV)/.run
	@AUTHBACKEND_LOG__FORMAT=$${AUTHBACKEND_LOG__FORMAT:-console} $(BIN)/authbackend serve --embedded .data --sample

test:
	@[ -n "$(ONLY)" ] || [ "$$(id -u)" = 0 ] || { echo "The tests with a broker and those on Python 3.13 need root. Run:  make check && sudo tools/test 3.13 && sudo tools/test broker"; exit 1; }
	@$(MAKE) --no-print-directory $(VENV)/.dev
	@tools/test $(ONLY)

check: $(VENV)/.dev
	@tools/test checks
	@tools/test no-broker

checks: $(VENV)/.dev
	@$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target $(CHECKS)

check-format:
	$(BIN)/ruff format --check .

check-lint:
	$(BIN)/ruff check .

check-types:
	$(BIN)/mypy
	$(BIN)/mypy --config-file= --ignore-missing-imports --follow-imports=silent --scripts-are-modules $$(grep -lE '^#!.*python3' tools/*)

check-layers:
	$(BIN)/lint-imports

check-dead-code:
	$(BIN)/vulture

check-site:
	BIN=$(BIN) tools/build-site --check

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks $(ARGS)

mutants: $(VENV)/.dev
	@$(BIN)/python tools/mutants $(ONLY)

fuzz: $(VENV)/.dev
	@$(BIN)/pip install --quiet --require-hashes --requirement requirements/fuzz.lock
	@$(BIN)/python tools/fuzz --seconds $(or $(SECONDS),60) $(ONLY)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

site: $(VENV)/.dev
	@BIN=$(BIN) tools/build-site

wheel: $(VENV)/.run
	@$(BIN)/hatchling build

docs: $(VENV)/.dev
	$(BIN)/python tools/generate-docs

clean:
	rm -rf $(VENV) $(VENV)-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache mutants .fuzz dist
