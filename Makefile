# make quickstart: set up, then data, baseline, SCINet and page.   make test: set up, then every check that CI runs.
SHELL := /bin/bash
BIN := .venv/bin
STAGE := .ci/stage
QUICKSTART ?= runs/quickstart
# nproc itself heeds OMP_NUM_THREADS
CORES := $(shell env -u OMP_NUM_THREADS nproc)
# a file's tests share what they start, so they stay together; those that start processes come first (tests/conftest.py)
SPREAD := -n $(CORES) --dist loadfile --no-loadscope-reorder
export OMP_WAIT_POLICY := passive
# processes share the cores: with more threads each, they wait for each other ten times as long
interpreted tests alone nightly faults: export OMP_NUM_THREADS := 1

.PHONY: help setup quickstart test checks lint types layers spelling interpreted tests alone nightly faults format clean

help: ## show these lines
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: ## install the locked packages once, and .venv for this clone
	@.ci/environment

quickstart: setup ## train SCINet and a baseline on the embedded data, and write a page (about 10 minutes)
	@echo "1/3 data: scenes drawn from OpenMoji"
	@test -f data/scenes/dataset.json || $(BIN)/scinet data build scenes --out data/scenes --count 2000
	@echo "2/3 baseline: binary cross-entropy on the known labels"
	@test -f $(QUICKSTART)-baseline/evaluation.json || PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --log_level warning scinet/train.py \
		--config configs/quickstart.yaml method=bce name=quickstart-baseline --resume auto
	@echo "3/3 SCINet"
	@test -f $(QUICKSTART)/evaluation.json || PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --log_level warning scinet/train.py \
		--config configs/quickstart.yaml baseline=$(QUICKSTART)-baseline --resume auto
	@$(BIN)/scinet show --run $(QUICKSTART)

test: setup ## every check, as in CI (10 minutes on two cores)
	@.ci/beside "$(MAKE) --no-print-directory checks interpreted" "$(MAKE) --no-print-directory tests"
	@$(MAKE) --no-print-directory alone

checks: lint types layers spelling

lint: setup
	@$(STAGE) "lint (ruff)" $(BIN)/ruff check .
	@$(STAGE) "format (ruff)" $(BIN)/ruff format --check .

types: setup
	@$(STAGE) "types (mypy --strict)" $(BIN)/mypy

layers: setup
	@$(STAGE) "layers (import-linter)" $(BIN)/lint-imports

spelling: setup
	@$(STAGE) "spelling (codespell)" $(BIN)/codespell scinet kernels cluster configs tests README.md CONTRIBUTING.md CHANGELOG.md

interpreted: setup ## Triton kernels in the interpreter, which wants a process of its own
	@$(STAGE) "kernels (Triton's interpreter)" env TRITON_INTERPRET=1 $(BIN)/pytest -m interpreter tests/kernels/interpreted

tests: setup
	@$(STAGE) "tests (pytest on $(CORES) cores)" $(BIN)/pytest $(SPREAD) -m "not nightly and not alone and not interpreter"

alone: setup ## tests that want the machine to themselves
	@$(STAGE) "tests that run alone (pytest)" $(BIN)/pytest -m "alone and not nightly"

nightly: setup ## what is too long for `make test`: whole matrices, soak, hosts, planted faults (half an hour)
	@status=0; \
	$(STAGE) "nightly (pytest on $(CORES) cores)" $(BIN)/pytest $(SPREAD) -m "nightly and not alone" || status=1; \
	$(STAGE) "nightly, alone (pytest)" $(BIN)/pytest -m "nightly and alone" || status=1; \
	$(STAGE) "planted faults" $(MAKE) --no-print-directory faults || status=1; \
	exit $$status

faults: setup ## plant each fault of tests/faults/*.toml in a copy, and see a test fail
	@$(BIN)/python tests/faults/run.py $(FAULTS)

format: setup ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove runs, data and caches of this clone; the shared environment stays
	rm -rf runs data .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
