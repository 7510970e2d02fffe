"""Fixtures: tiny models, loaded once a session, and one call that runs a Patchscope's cells."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
from pathlib import Path

# Before torch and transformers are imported, which read these then; so do the processes that tests start.
# Threads gain nothing for tiny matrices, and lose much where several processes share the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if importlib.util.find_spec("anyio"):
    # Before nnsight, whose `.save` on every object breaks it; the explorer's server and its tests need it.
    import anyio._backends._asyncio  # noqa: F401
import hypothesis
import pytest
import tiny
import torch
from filelock import FileLock

from patchscope_nn.backends import Places, run_steps
from patchscope_nn.data.readers import READERS
from patchscope_nn.mappings import resolve_mapping
from patchscope_nn.metrics import COLUMNS, METRICS
from patchscope_nn.models import builtin, load
from patchscope_nn.plan import plan
from patchscope_nn.proof import store
from patchscope_nn.spec import SITES
from patchscope_nn.spec.mapping import MAPPINGS
from patchscope_nn.sweep import expand

torch.set_num_threads(1)

# The same examples in every run: two tokens of a random model may be equally likely, to a rounding error.
hypothesis.settings.register_profile(
    "tests",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


#: The folders whose tests fail most often; they run first.
FIRST = ("contracts", "equivalence", "proof")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    rooms = {item: item.path.relative_to(here).parts[0] for item in items}
    items.sort(key=lambda item: FIRST.index(rooms[item]) if rooms[item] in FIRST else len(FIRST))


def pytest_collection_finish():
    """Spare the garbage collector what lives to the end: torch, transformers and thousands of tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the session's own, also for the processes it starts: no verdict or fit of the user's.

    Of the user's own it has the converted builtin model, which takes long to make. The workers of
    pytest-xdist share the folder, so a model is converted once and proven by whoever needs it first.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    place = root / "cache"
    place.mkdir(exist_ok=True)
    with FileLock(root / "cache.lock"):
        converted = builtin.folder()
        if converted is not None and not (place / converted.name).exists():
            (place / converted.name).symlink_to(converted, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHSCOPE_CACHE", str(place))
        yield place


@pytest.fixture
def verdicts(monkeypatch, tmp_path):
    """An empty store of verdicts: none is kept from one test to the next."""
    place = tmp_path / "proofs"
    monkeypatch.setattr(store, "folder", lambda: place)
    return place


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is forgotten when it ends."""
    for registry in (METRICS, COLUMNS, READERS, MAPPINGS):
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
        monkeypatch.setattr(registry, "_homes", dict(registry._homes))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, saved as transformers saves it."""
    place = tmp_path_factory.mktemp("llama")
    tiny.make_module("llama").save_pretrained(place)
    tiny.make_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(family, seed=..., copy=..., bos=...): a loaded model; another copy is another object."""

    @functools.cache
    def get(family="llama", *, seed=0, copy=0, bos=False, d_model=tiny.D_MODEL, n_layers=tiny.N_LAYERS):
        module = tiny.make_module(family, seed=seed, d_model=d_model, n_layers=n_layers)
        return load(module, tokenizer=tiny.TOKENIZER_BOS if bos else tiny.TOKENIZER)

    return get


@pytest.fixture(scope="session")
def run_cells():
    """run_cells(scope, model, ...): the sweep's cells in order, each with its raw readout."""

    def run(scope, model, target=None, *, rows=({},), controls=(), seed=0, remote=False, **options):
        target = target or model
        sweep = expand(scope, rows=rows, controls=controls, source=model, target=target, seed=seed)
        backend = Places.of(remote).backend
        planned = plan(sweep, remote=backend.remote, **options)
        sites = tuple(SITES[side.site].space for side in (scope.source, scope.target))
        mapping = resolve_mapping(
            scope.mapping, source=model.info, target=target.info, pairs=sweep.cells.pairs, sites=sites
        )
        steps = run_steps(planned, source=model, target=target, mapping=mapping, backend=backend)
        ran = [cell for step in steps for result in step for cell in result.raw(sweep)]
        assert len({cell.number for cell, _ in ran}) == len(ran) == planned.n_cells
        return sorted(ran, key=lambda one: one[0].number)

    return run
