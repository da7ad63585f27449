# Two commands do all set-up: `make run` and `make test`. `make` alone lists the others.

# The first of these that is new enough; or say which: make PYTHON=python3.12
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SEEDS ?= 200

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run demo test check format sim wheel ci clean formatted lint types

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

run: .venv/run  ## start a daemon from conf/serfd.toml; Ctrl-C leaves the cluster and ends it
	@exec $(BIN)/serfd --config conf/serfd.toml

demo: .venv/run  ## three daemons on loopback: join, fail, leave
	@exec $(BIN)/python scripts/demo.py

test: formatted lint types  ## everything: format, lint, types, all tests
	$(BIN)/pytest -n 2 --dist loadfile

check: formatted lint types  ## format, lint, types and the fast tests: what you run all day
	$(BIN)/pytest -n 2 --dist loadfile -m "not daemon and not interop"

format: .venv/dev  ## let ruff format the code and mend what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

sim: .venv/dev  ## simulated clusters: SEEDS=200 of them, or SEED=4711 again
	$(BIN)/python -m serfd.sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

wheel: .venv/run  ## build the wheel and try it in an empty environment
	rm -rf dist build/empty
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m venv build/empty
	build/empty/bin/pip install --quiet dist/serfd-*.whl
	# -event-handler: the bundled plugins must have come along.
	build/empty/bin/serfd --check --config conf/serfd.toml -event-handler true
	build/empty/bin/serfctl version

ci: test sim wheel  ## what .ci/run runs when it has installed system packages

clean:  ## remove the environment and everything that was built
	rm -rf .venv build dist htmlcov .coverage .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

formatted: .venv/dev
	$(BIN)/ruff format --check .

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: .venv/dev
	$(BIN)/mypy

# The environment: `run` is a mark that serfd is in it, `dev` that its tools are too. It is built anew
# when pyproject.toml is newer.

.venv/run: pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'serfd needs Python 3.11 or newer$(and $(PYTHON),; `$(PYTHON)` is not).' \
		'Install it, or say where it is: make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	# A newer pip writes start scripts that import less: serfctl starts 4 ms sooner.
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/dev: .venv/run
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@
