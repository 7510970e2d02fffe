"""Every shipped recipe gives on vLLM what it gives on transformers, or is refused before anything runs."""

from __future__ import annotations

import pytest
from one_table import assert_one_table

import patchscope_nn as ps
from patchscope_nn.errors import ModelError, PatchscopeError
from patchscope_nn.recipe import load_recipe, shipped
from patchscope_nn.spec.fitting import Fit

#: Recipes that vLLM cannot run, and what their error says.
REFUSED = {"attention-knockout": r"the engine vllm does not take. Use the engine transformers"}
#: Recipes whose mapping is trained through the weights, which vLLM has in processes of its own.
TRAINED = {
    "attribute-lens": [],
    "caption-mapping": ["mapping.train.steps=2"],
    "tuned-lens": ["mapping.train.steps=2"],
}
#: One of each kind.
QUICK = ("causal-tracing", "entity-description", "next-token")
RECIPES = [
    pytest.param(name, marks=[pytest.mark.vllm_quick] if name in QUICK else [])
    for name in shipped()
    if name not in REFUSED
]


def few(name):
    """A recipe with two source layers, and two target layers where it sweeps them; fits are short."""
    recipe = load_recipe(name)
    layer = recipe.target.layer
    sets = ["source.layer=[3, 12]", *TRAINED.get(name, [])]
    sets += [] if layer == "same" or isinstance(layer, int) else ["target.layer=[4, 20]"]
    sets += ["mapping.fit.limit=30"] if isinstance(recipe.mapping, Fit) else []
    return load_recipe(name, sets=sets)


def tables(run):
    """The tables of a run, or of each method of an experiment."""
    runs = run if isinstance(run, ps.Experiment) else {"": run}
    return {name: runs[name].table() for name in runs}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name, engine, here):
    recipe = few(name)
    if name in TRAINED:
        with pytest.raises(
            ModelError, match=r"not in this process\. Run it once here, .* engine transformers"
        ):
            ps.run(recipe, limit=3, model=engine)
        ps.run(recipe, limit=3, model=here)
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
