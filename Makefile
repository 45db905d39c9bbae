# `make demo` and `make test` each do all set-up on a machine that has only Python, make and the package registry.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WHEEL  := build/wheel-env

DEVICE ?= cuda

# Empty: tests that pytest has rewritten, and what other interpreters import, are compiled once and not in each process.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test exhaustive quick lint types wheel-env tests tests-shared tests-alone benchmark benchmark-tools benchmark-compression benchmark-partition benchmark-cyclic benchmark-faults benchmark-gpu docs clean

help:
	@echo "make demo       set up, then train DDP, local SGD and QSR on real digits, and compare accuracy, bytes and times"
	@echo "make test       set up, then run every check that CI runs"
	@echo "make exhaustive  the same with every case of every grid of tests, as before a release"
	@echo "make quick      the same without what is slow, against the source folder"
	@echo "make setup      only the set-up: a virtual environment in $(VENV)"
	@echo "make benchmark  the speed of the lab's links, of the averages, and what strategy and profiler cost, on this machine"
	@echo "make benchmark-tools  step times of other tools and ours on emulated hosts (half an hour)"
	@echo "make benchmark-compression  what compression and overlap save on emulated hosts, and accuracy under them (75 minutes)"
	@echo "make benchmark-partition  what shares by speed gain, what they cost, and accuracy under them (40 minutes)"
	@echo "make benchmark-cyclic  what staggered workers gain on emulated hosts and in a shared memory, and accuracy under delay (1 hour)"
	@echo "make benchmark-faults  what becomes of runs, and of their checkpoints, when ranks, links, disks and files are hurt (25 minutes)"
	@echo "make benchmark-gpu  what can be shown on one GPU (8 minutes); with DEVICE=cpu, that the check works"
	@echo "make docs       the documentation as HTML in docs/_build"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lightning_comm needs Python 3.10 or newer; this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing (torch is several GB; about two minutes on a fast line) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[examples,docs,dev]"
	touch $@

demo: setup
	$(BIN)/lightning-comm demo

# mypy takes less than the tests that share the cores do, and nothing else runs beside those that are judged by seconds.
test: lint wheel-env
	failed=0; \
	  $(MAKE) --no-print-directory types & types=$$!; \
	  $(MAKE) --no-print-directory tests-shared || failed=1; \
	  wait $$types || failed=1; \
	  $(MAKE) --no-print-directory tests-alone || failed=1; \
	  exit $$failed

exhaustive:
	$(MAKE) test PYTEST_ARGS="--exhaustive $(PYTEST_ARGS)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

# The tests run against the built wheel, in an environment that cannot see the source folder: it borrows the
# dependencies of $(VENV), but not its editable install.
wheel-env: setup
	rm -rf build/dist $(WHEEL)
	$(BIN)/python -m build --wheel --no-isolation --outdir build/dist . > build-wheel.log 2>&1 || (cat build-wheel.log; exit 1)
	rm -f build-wheel.log
	$(BIN)/python -m venv --without-pip $(WHEEL)
	$(BIN)/python -c 'import pathlib, sysconfig; site = next(pathlib.Path("$(WHEEL)").glob("lib/python*/site-packages")); (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")'
	$(BIN)/python -m pip --python $(WHEEL)/bin/python install --quiet --disable-pip-version-check --no-deps build/dist/*.whl

# What is judged by seconds (timing.txt) runs alone; all else is dealt to workers, file by file, since the tests of a file
# share their references. Exit code 5 is pytest's for `no test`, as where PYTEST_ARGS selects none here.
PYTEST := -m pytest -c ../pyproject.toml --durations=25
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
IN_WHEEL := cd tests && LIGHTNING_COMM_WHEEL=1 ../$(WHEEL)/bin/python $(PYTEST)

tests: wheel-env
	failed=0; \
	  $(MAKE) --no-print-directory tests-shared || failed=1; \
	  $(MAKE) --no-print-directory tests-alone || failed=1; \
	  exit $$failed

tests-shared:
	$(IN_WHEEL) $(SHARED) -m "not timing" --doctest-modules --pyargs lightning_comm . $(PYTEST_ARGS)

tests-alone:
	$(IN_WHEEL) -m timing @timing.txt $(PYTEST_ARGS) || test $$? -eq 5

quick: setup
	$(BIN)/ruff check .
	cd tests && PYTHONPATH=$(CURDIR) ../$(BIN)/python $(PYTEST) $(SHARED) -m "not slow and not timing" . $(PYTEST_ARGS)

benchmark: setup
	$(BIN)/python -m benchmarks.instruments.lab
	$(BIN)/python -m benchmarks.local_update.speed
	$(BIN)/python -m benchmarks.instruments.profiler

# Half an hour, on a quiet machine; brings accelerate and torchft, to compare with.
benchmark-tools: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[benchmark]"
	$(BIN)/python -m benchmarks.tools

# Some 75 minutes in all, on a quiet machine: a synchronisation alone 4, PowerSGD beside torch's hook below 1, steps
# under each compression 30, local updates with and without overlap 20, accuracy on digits 20. Brings accelerate, to
# compare with.
benchmark-compression: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[benchmark]"
	$(BIN)/python -m benchmarks.compression.synchronisation
	$(BIN)/python -m benchmarks.compression.power_sgd
	$(BIN)/python -m benchmarks.compression.steps
	$(BIN)/python -m benchmarks.local_update.overlap
	$(BIN)/python -m benchmarks.compression.accuracy
	$(BIN)/python -m benchmarks.compression.power_sgd

# Some 40 minutes in all, on a quiet machine: unequal speeds 10, jitter 10, overhead 3, contention 5, accuracy on digits 10.
benchmark-partition: setup
	$(BIN)/python -m benchmarks.adaptive_partition
	$(BIN)/python -m benchmarks.adaptive_partition.accuracy

# Some 60 minutes in all, on a quiet machine: step times 35, activations 10, a memory that ranks share 8, accuracy 10.
benchmark-cyclic: setup
	$(BIN)/python -m benchmarks.cyclic.steps
	$(BIN)/python -m benchmarks.cyclic.memory
	$(BIN)/python -m benchmarks.cyclic.shared_memory
	$(BIN)/python -m benchmarks.cyclic.accuracy
	$(BIN)/python -m benchmarks.cyclic.contents

# Some 25 minutes, on a quiet machine. Links can be cut, and disks be small, for root alone on most machines.
benchmark-faults: setup
	$(BIN)/python -m benchmarks.faults

# Eight minutes on a machine with a GPU, by itself. With DEVICE=cpu tiny sizes anywhere, in about three minutes.
benchmark-gpu: setup
	PYTHONUNBUFFERED=1 $(BIN)/python -m benchmarks.gpu_check --device $(DEVICE) --out build/gpu_check/$(DEVICE)

docs: setup
	$(BIN)/sphinx-build -W -b html docs docs/_build

clean:
	rm -rf build $(VENV) docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
