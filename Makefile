# `make serve` and `make test` are all that a fresh machine needs: git, make, python3 with venv.
# With a Python older than 3.13 there is a second one, which can do TLS-PSK, in .venv-3.13.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := pip install --quiet --disable-pip-version-check
IMAGE ?=
QUICK ?=
TIME ?= 600
# More arguments: make serve ARGS='-p 0', make test ARGS='-k qcow2'
ARGS ?=

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: .venv/installed ## Serve IMAGE=disk.qcow2, or a demo chain where none is named
ifeq ($(IMAGE),)
	@image=$$($(BIN)/pynbd demo .venv/demo) && exec $(BIN)/pynbd serve $(ARGS) "$$image"
else
	@exec $(BIN)/pynbd serve $(ARGS) '$(IMAGE)'
endif

test: check ## Run every check and every test, real peers included
	@$(MAKE) --no-print-directory peers || [ "$$CI" != true ]
	@$(BIN)/pytest -q -n auto $(ARGS)

test313: peers ## Run every test with Python 3.13 or later, be .venv older
	@python=$$($(BIN)/python -m interop.peers python313) && "$$python" -m pytest -q -n auto $(ARGS)

check: .venv/tested ## Lint, formatting, types, layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/pytest -qq tests/test_layers.py

bench: .venv/tested peers ## Compare the speed with qemu-nbd and nbdkit; QUICK=1 takes two minutes
	@$(BIN)/python -m interop.bench $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

soak: .venv/tested peers ## Write qcow2 images in every way for twenty minutes; the figures
	@$(BIN)/python -m interop.soak $(ARGS)

fuzz: .venv/tested ## Throw bytes at every reader of them, TIME seconds each (default: 600)
	@$(BIN)/python -m tests.fuzz --seconds $(TIME) $(ARGS)

faults: .venv/tested peers ## Let every system call fail in every way, one after the other
	@$(BIN)/python -m interop.faults $(ARGS)

damage: .venv/tested peers ## Open thousands of damaged images, for reading and for writing
	@$(BIN)/python -m interop.damage --count 5000 $(ARGS)
	@$(BIN)/python -m interop.damage --part writing --count 5000 $(ARGS)
	@$(BIN)/python -m interop.damage --part 'writing untrusted' --count 5000 $(ARGS)

peers: .venv/tested ## Find the peers of the interop tests, or build their tree in ~/.cache/pynbd
	@$(BIN)/python -m interop.peers --host || interop/rootfs.sh
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 13))' || \
		flock pyproject.toml $(MAKE) --silent .venv-3.13/tested

docs: .venv/installed ## Write docs/reference.md anew, from the help of every command
	@$(BIN)/pynbd man --markdown > docs/reference.md

clean: ## Remove the virtual environment and every cache in the checkout
	rm -rf .venv .venv-3.13 build dist bench.json .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find pynbd tests interop -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL) --editable .
	@$(BIN)/python -m compileall -q pynbd
	@touch $@

.venv/tested: .venv/installed
	$(BIN)/$(INSTALL) --editable '.[test]'
	@touch $@

# Debian's Python brings no pip along, and the pip of an older Python may not run in a newer one.
.venv-3.13/tested: pyproject.toml
	@echo 'making .venv-3.13 (about a minute)'
	@python=$$($(BIN)/python -m interop.peers python3) && "$$python" -m venv --clear --without-pip .venv-3.13
	@$(BIN)/$(INSTALL) --target .venv-3.13/lib/python3*/site-packages pip
	@.venv-3.13/bin/python -m $(INSTALL) --editable '.[test]'
	@touch $@

.PHONY: help serve test test313 check bench soak fuzz faults damage peers docs clean
