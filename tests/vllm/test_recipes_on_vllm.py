"""Every shipped recipe gives on vLLM what it gives on transformers, or is refused before anything runs."""

from __future__ import annotations

import pytest
from one_table import assert_one_table

import patchscope_nn as ps
from patchscope_nn.errors import PatchscopeError
from patchscope_nn.recipe import load_recipe, shipped

#: Recipes that vLLM cannot run, and what their error says.
REFUSED = {"attention-knockout": r"the engine vllm does not take. Use the engine transformers"}
#: One of each kind.
QUICK = ("causal-tracing", "entity-description", "next-token")


def few(name):
    """A recipe with two source layers, and two target layers where it sweeps them."""
    layer = load_recipe(name).target.layer
    swept = [] if layer == "same" or isinstance(layer, int) else ["target.layer=[4, 20]"]
    return load_recipe(name, sets=["source.layer=[3, 12]", *swept])


def tables(run):
    """The tables of a run, or of each method of an experiment."""
    runs = run if isinstance(run, ps.Experiment) else {"": run}
    return {name: runs[name].table() for name in runs}


@pytest.mark.parametrize("name", [name for name in shipped() if name not in REFUSED])
def test_every_recipe(name, engine, here):
    recipe = few(name)
    # As many rows as a probe has folds.
    found, expected = (tables(ps.run(recipe, limit=3, model=model)) for model in (engine, here))
    assert found.keys() == expected.keys()
    for method, table in found.items():
        assert_one_table(table, expected[method])


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_run_is_refused_before_anything_runs(name, engine, monkeypatch):
    monkeypatch.setattr(type(engine.traced), "trace", None)
    with pytest.raises(PatchscopeError, match=REFUSED[name]):
        ps.run(few(name), limit=3, model=engine)
