"""What a real server gives is what this process gives: every readout, context, mapping and recipe."""

from __future__ import annotations

import time
from dataclasses import replace

import launch
import pytest
import torch
from own_mappings import Bent, doubled
from tables import assert_same_table

import patchscope_nn as ps
from patchscope_nn.backends.jobs.job_log import JobLog
from patchscope_nn.models import builtin
from patchscope_nn.recipe import load_recipe, shipped

BUILTIN, TINY = launch.BUILTIN, launch.TINY
READOUTS = {
    "next_token": ps.NextToken(),
    "reference": ps.NextToken(reference="source", top_k=2),
    "generate": ps.Generate(max_new_tokens=5),
    "sample": ps.Generate(max_new_tokens=4, temperature=1.0, seed=3),
    "choices": ps.Choices([" Paris", " is in", "The"]),
    "hidden": ps.Hidden(),
}
ROWS = [{"s": "The Eiffel Tower is in"}, {"s": "Diana"}]


@pytest.fixture(scope="module")
def models(folders):
    """load(name, weights=...): a model by its id, with its weights from the folder that the server has."""
    cache = {}

    def get(name, *, weights):
        if (name, weights) not in cache:
            cache[name, weights] = ps.load(folders[name] if weights else name, weights=weights)
        return cache[name, weights]

    return get


def scope_of(readout, **mapping):
    return ps.Patchscope(
        source=ps.Source(prompt="{s}", position=-1, layer=["embed", 1, 4]),
        target=ps.Target(prompt="Diana is in Paris: x", position=-1, layer=[2, 4]),
        readout=READOUTS[readout],
        **mapping,
    )


def table(scope, **options):
    return ps.run(scope, data=ROWS, controls=["unpatched", "random", "shuffled"], **options).table()


def assert_same(one, other):
    names = ["source_model", "target_model"]
    assert_same_table(one.drop(columns=names), other.drop(columns=names))


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("name", [BUILTIN, TINY])
def test_every_readout(readout, name, ndif, models):
    local = table(scope_of(readout), model=models(name, weights=True))
    away = models(name, weights=False)
    assert away.info.device == "remote"
    assert not away.traced.dispatched
    assert_same(table(scope_of(readout), model=away, remote=ndif), local)
    assert not away.traced.dispatched


@pytest.mark.parametrize("readout", READOUTS)
def test_a_fused_trace(readout, ndif, models):
    scope = ps.Patchscope(
        source=ps.Source(prompt="Diana", position=-1, layer=[0, 1]),
        target=ps.Target(prompt="The city of x", position=-1, layer=[2, 3]),
        readout=READOUTS[readout],
    )
    local = ps.run(scope, model=models(TINY, weights=True), context="session").table()
    found = ps.run(scope, model=models(TINY, weights=False), context="fused", remote=ndif).table()
    assert_same(found, local)


WIDTH = 48
MAPPINGS = {
    "target_norm": "target_norm",
    "affine": ps.Affine(torch.eye(WIDTH) * 2, torch.ones(WIDTH)),
    "torch module": torch.nn.LayerNorm(WIDTH),
    "own module": Bent(),
    "function": doubled,
    "lambda": lambda states: states + 1,
}


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_mapping_travels(mapping, ndif, models):
    scope = scope_of("next_token", mapping=MAPPINGS[mapping])
    local = table(scope, model=models(TINY, weights=True))
    assert_same(table(scope, model=models(TINY, weights=False), remote=ndif), local)


@pytest.mark.parametrize("source_remote", [False, True], ids=["source here", "source there"])
@pytest.mark.parametrize("remote", [False, True], ids=["target here", "target there"])
@pytest.mark.parametrize("pair", [(TINY, BUILTIN), (BUILTIN, TINY)], ids=["small to large", "large to small"])
def test_two_models_in_all_places(pair, source_remote, remote, ndif, models):
    """Small source, large target, with an affine mapping; and the other way."""
    source, target = pair
    widths = {TINY: WIDTH, BUILTIN: 576}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(widths[target], widths[source], generator=generator) / widths[source] ** 0.5
    mapping = ps.Affine(weight, torch.zeros(widths[target]))
    for readout in ("next_token", "generate"):
        scope = scope_of(readout, mapping=mapping)
        local = table(
            scope, source_model=models(source, weights=True), target_model=models(target, weights=True)
        )
        found = table(
            scope,
            source_model=models(source, weights=not source_remote),
            target_model=models(target, weights=not remote),
            remote=ndif if remote else False,
            source_remote=ndif if source_remote else False,
        )
        assert_same(found, local)


def test_reading_the_source_is_a_job_too(ndif, models, tmp_path):
    """In the job_log, and where its client died, lost: nobody could go on with its states."""
    scope = scope_of("next_token", mapping=ps.Affine(torch.eye(576)[:, :WIDTH], torch.zeros(576)))
    away = {"source_model": models(TINY, weights=False), "target_model": models(BUILTIN, weights=False)}
    here = {name: models(model, weights=True) for name, model in zip(away, (TINY, BUILTIN), strict=True)}
    found = ps.run(scope, data=ROWS, out=tmp_path / "run", remote=ndif, max_rows=2, jobs=2, **away).table()
    assert_same(found, ps.run(scope, data=ROWS, **here).table())
    jobs = JobLog(tmp_path / "run").jobs()
    kinds = [job.context for job in jobs]
    assert kinds.count("read") == kinds.count("session") == len(kinds) / 2
    assert {job.state for job in jobs} == {"done"}
    max((tmp_path / "run/cells").glob("*.arrow")).unlink()
    JobLog(tmp_path / "run").sent(replace(jobs[0], id="of-a-client-that-died", state="live"))
    assert_same(ps.run(scope, data=ROWS, out=tmp_path / "run", remote=ndif, **away).table(), found)
    states = {job.id: job.state for job in JobLog(tmp_path / "run").jobs()}
    assert states.pop("of-a-client-that-died") == "lost"
    assert set(states.values()) == {"done"}


#: Of each kind of source, write and readout one; the others wait for test-remote-all.
FIRST = ("activation-oracle", "attention-knockout", "causal-tracing", "entity-description", "next-token")
RECIPES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in shipped()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe, ndif, models):
    """By its own name, as a user runs it: the builtin model, which the server knows by its id."""
    layer = load_recipe(recipe).target.layer
    few = [] if layer == "same" or isinstance(layer, int) else ["target.layer=[4, 20]"]
    loaded = load_recipe(recipe, sets=["source.layer=[3, 12]", *few])
    # As many rows as a probe has folds.
    local, away = (ps.run(loaded, limit=3, remote=remote) for remote in (False, ndif))
    several = isinstance(local, ps.Experiment)
    for name in local if several else ("",):
        one, other = (run[name] if several else run for run in (away, local))
        assert_same(one.table(), other.table())
    assert builtin.HUB_ID == BUILTIN


def test_a_sweep_of_900_cells_is_one_small_request_and_hardly_slower(ndif, models, monkeypatch):
    """Against the same compute here: at most 1.3 times, and three seconds."""
    from nnsight.intervention.backends.remote import RemoteBackend

    results, load = [], RemoteBackend.finalize

    def finalize(backend, content):
        results.append(len(content))
        return load(backend, content)

    monkeypatch.setattr(RemoteBackend, "finalize", finalize)
    scope = ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower is in the city of", layer="all"),
        target=ps.Target(prompt=ps.prompts.IDENTITY, layer="all"),
        readout=ps.NextToken(top_k=5),
    )
    took = []
    for options in ({"weights": True}, {"weights": False}) * 2:
        started = time.monotonic()
        run = ps.run(scope, model=models(BUILTIN, **options), remote=False if options["weights"] else ndif)
        took.append(time.monotonic() - started)
        assert len(run.rows) == 900
    assert len(results) == 2
    assert max(results) < 100_000
    assert took[3] <= 1.3 * took[2] + 3


def test_a_large_run_begins_with_a_short_job(ndif, models, tmp_path):
    """What that took tells how large the others are; here, all that is left, since the model is tiny."""
    scope = ps.Patchscope(
        source=ps.Source(prompt="{s}", position={"each": "all"}, layer="all"),
        target=ps.Target(prompt="Diana is in Paris: x", position=-1, layer="all"),
    )
    rows = [{"s": f"{word} is in the city of {word} and the Tower"} for word in ("Paris", "Diana", "Eiffel")]
    local = ps.run(scope, model=models(TINY, weights=True), data=rows)
    away = ps.run(scope, model=models(TINY, weights=False), data=rows, remote=ndif, out=tmp_path / "run")
    assert len(local.rows) > 1024
    assert_same(away.table(), local.table())
    sizes = [len(job.cells) for job in JobLog(tmp_path / "run").jobs()]
    assert sizes[0] == 256
    assert sum(sizes) == len(local.rows)
    assert max(sizes[1:]) > 256
