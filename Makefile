# Everything runs in .venv, which scripts/install.sh makes and keeps up to date.
# ARGS goes to the program (make serve ARGS="--port 9000"); PYTHON and UV say where those are.

DEVICE ?= cpu
ARGS ?=
BIN := .venv/bin
# Apart from .venv, because it holds plugins for devices that are not here, which JAX would try to start.
NIGHTLY := .venv-nightly
NIGHTLY_EXTRAS := dev,parity,clients,aot
QUICK := not slow and not clients and not aot
# Tests that share something expensive stay on one worker (tests/conftest.py), what takes longest begins first.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
# Where nearly nothing is compiled; the few tests of them that start an engine are marked `heavy`.
FAST := tests/store tests/eval tests/serve $(wildcard tests/test_*.py)
INPUTS := pyproject.toml constraints.txt requirements-model.txt scripts/install.sh

EXTRA_cpu :=
EXTRA_cuda := cuda
EXTRA_tpu := tpu
ifeq ($(filter $(DEVICE),cpu cuda tpu),)
$(error DEVICE=$(DEVICE) is not known: cpu, cuda or tpu)
endif

# Each recipe is one shell that has `phase NAME COMMAND`, which prints the seconds the command took.
.ONESHELL:
.SHELLFLAGS := -ec
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help serve test test-fast test-aot nightly lint format bench bench-device train-device constraints

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

serve: .venv/installed-$(DEVICE) ## Install, then serve on DEVICE=cpu (default), cuda or tpu
	@exec $(BIN)/python -m kvjax.serve $(ARGS)

test: .venv/installed-test ## Run the tests that take seconds
	@. scripts/phase.sh
	failed=0
	phase "tests" $(BIN)/python -m pytest $(PARALLEL) -m "$(QUICK) and not timing" --durations=25 \
		--ignore=tests/distributed $(ARGS) || failed=$$?
	phase "tests, timing" $(BIN)/python -m pytest -m "$(QUICK) and timing" --durations=5 \
		$$(grep -rl --include='test_*.py' 'mark\.timing' tests) || failed=$$?
	phase "tests, 8 dev." $(BIN)/python -m pytest -m "$(QUICK)" --durations=5 \
		tests/distributed || failed=$$?
	exit $$failed

test-fast: .venv/installed-test ## Run the tests that start no engine, in two minutes
	@$(BIN)/python -m pytest $(PARALLEL) -m "$(QUICK) and not timing and not heavy" $(FAST) $(ARGS)

nightly: $(NIGHTLY)/installed ## Run every test: slow ones, third-party clients, compiling for other devices
	@. scripts/phase.sh
	export HYPOTHESIS_PROFILE=nightly
	failed=0
	phase "tests" $(NIGHTLY)/bin/python -m pytest --durations=50 --ignore=tests/distributed $(ARGS) || failed=$$?
	phase "tests, 8 dev." $(NIGHTLY)/bin/python -m pytest --durations=5 tests/distributed || failed=$$?
	exit $$failed

test-aot: $(NIGHTLY)/installed ## Compile every kernel for TPUs and an H200 that are not here; print what each takes
	@$(NIGHTLY)/bin/python -m pytest -m aot -s $(ARGS)

lint: .venv/installed-dev ## Check style, format and types
	@. scripts/phase.sh
	failed=0
	phase "ruff check" $(BIN)/ruff check || failed=1
	phase "ruff format" $(BIN)/ruff format --check || failed=1
	phase "pyright" $(BIN)/pyright || failed=1
	exit $$failed

format: .venv/installed-dev ## Format, and mend what ruff can mend
	@$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

bench: .venv/installed-test ## Print the measurements that the documents quote; takes minutes on an idle machine
	@$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.foundation $(ARGS)

# Without DEVICE this is for a CUDA machine; what it compiled once it keeps, for it may be killed and called again.
TRAIN_ON := $(if $(filter file,$(origin DEVICE)),cuda,$(DEVICE))
train-device: .venv/installed-train-$(TRAIN_ON) ## Train the larger model from nothing, measure it, draw the plots
	@JAX_COMPILATION_CACHE_DIR=.cache/jax exec $(BIN)/python -m benchmarks.model_card.reproduce \
		--config configs/train/h200.yaml --compared 1 $(ARGS)

# As above; the exit status of the program itself says whether points are left, that of make does not.
bench-device: .venv/installed-bench-$(TRAIN_ON) ## Measure kernels and decode on a device (ARGS="--output device.json")
	@JAX_COMPILATION_CACHE_DIR=.cache/jax exec $(BIN)/python -m benchmarks.device $(ARGS)

constraints: .venv/installed-dev ## Move constraints.txt to the newest versions (jax stays at JAX=0.11.2)
	@. scripts/phase.sh
	phase "constraints" sh scripts/constraints.sh
	git --no-pager diff --stat -- constraints.txt

.venv/installed-cpu .venv/installed-cuda .venv/installed-tpu: .venv/installed-%: $(INPUTS)
	@sh scripts/install.sh $(EXTRA_$*) && touch $@

.venv/installed-train-cpu .venv/installed-train-cuda .venv/installed-train-tpu: .venv/installed-train-%: $(INPUTS)
	@sh scripts/install.sh train,parity$(EXTRA_$*:%=,%) && touch $@

.venv/installed-bench-cpu .venv/installed-bench-cuda .venv/installed-bench-tpu: .venv/installed-bench-%: $(INPUTS)
	@sh scripts/install.sh dev$(EXTRA_$*:%=,%) && touch $@

.venv/installed-dev: $(INPUTS)
	@sh scripts/install.sh dev && touch $@

.venv/installed-test: $(INPUTS)
	@sh scripts/install.sh dev,parity && touch $@ .venv/installed-dev

$(NIGHTLY)/installed: $(INPUTS)
	@VENV=$(NIGHTLY) sh scripts/install.sh $(NIGHTLY_EXTRAS) && touch $@
