# Needs Python 3.11 or newer, make, git and a package index; everything else goes into $(VENV).
#
#   PYTHON   interpreter that makes the environment
#   VENV     folder of the environment
#   WORKERS  tests that run side by side
#   ARGS     more arguments for pytest, such as ARGS="tests/model -x"
#   LOGDIR   runs that `make test-browser` looks at, such as runs/digits_figure4_nfe
#   TORCH    version of torch that `make lock` pins

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
WORKERS ?= auto
ARGS ?=
LOGDIR ?=
TORCH ?= 2.13.0

BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(if $(CI),--quiet)

# Stamps: newer than the files that decide what is installed, so that a second run installs nothing.
CREATED := $(VENV)/.created
CORE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
SWEEP := sweeps/quickstart.yaml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart notebooks test test-gpu test-browser test-cluster lint docs site env lock clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(CORE) ## train on digits, compare three depths: a table, curves, TensorBoard
	$(BIN)/madformer sweep run $(SWEEP)
	$(BIN)/madformer report $(SWEEP)
	@echo "In TensorBoard: $(BIN)/tensorboard --logdir runs"

notebooks: $(DEV) ## execute the notebooks, and write them with their outputs
	$(BIN)/python scripts/execute_notebooks.py

test: $(DEV) ## run the tests
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal $(ARGS)

test-gpu: ## run the tests that need a CUDA device, by $(PYTHON) as it is: nothing is installed
	$(PYTHON) -m pytest -m cuda -p no:cacheprovider $(ARGS) tests/model/test_cuda.py; status=$$?; \
	$(PYTHON) -m pytest -m cuda -p no:cacheprovider $(ARGS) tests/training/test_cuda_training.py && exit $$status

test-browser: $(DEV) ## look at TensorBoard's curves and a report's page, and keep pictures; installs Debian's Chromium, as root
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver; }
	LOGDIR="$(LOGDIR)" $(BIN)/python -m pytest -s tests/evaluation/test_tensorboard_browser.py tests/report/test_page.py $(ARGS)

test-cluster: $(DEV) ## run the tests that start databases and a Slurm of their own; installs Debian's packages, as root
	@command -v sbatch munged slurmctld >/dev/null || bash tests/sweep/servers/slurm.sh install
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || bash tests/sweep/servers/postgresql.sh install
	@command -v mariadbd mariadb-install-db >/dev/null || bash tests/sweep/servers/mariadb.sh install
	SERVERS=1 REPETITIONS=20 $(BIN)/python -m pytest -s tests/sweep/test_queue.py tests/sweep/test_study_servers.py $(ARGS)

lint: $(DEV) ## check style, format, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: $(DEV) ## write the generated pages of the docs and draw the figures of the concepts
	$(BIN)/python scripts/write_configuration.py
	$(BIN)/python scripts/write_command_line.py
	$(BIN)/python scripts/draw_concepts.py

site: $(DEV) ## build the documentation, into build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

env: $(DEV) ## install the package and the developers' tools into .venv

lock: ## write constraints.txt anew
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install torch==$(TORCH) --editable '.[dev,docs,fid]'
	build/lock/bin/python -m pip freeze --all --exclude-editable --exclude pip > build/lock/frozen.txt
	grep '^#' constraints.txt > build/lock/constraints.txt
	sed 's/+[a-z0-9.]*$$//' build/lock/frozen.txt >> build/lock/constraints.txt
	mv build/lock/constraints.txt constraints.txt

clean: ## remove the environment, caches and build outputs, but no runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(CREATED):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer not found: install it, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(CORE): pyproject.toml constraints.txt $(CREATED)
	$(INSTALL) --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt $(CREATED)
	$(INSTALL) --editable '.[dev,docs]'
	@touch $(CORE) $@
