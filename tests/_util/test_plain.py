"""Numbers of numpy, torch and pandas work wherever Python's do; booleans are no numbers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

import patchscope_nn as ps
from patchscope_nn._util.plain import plain
from patchscope_nn.errors import SpecError
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.recipe import resolved
from patchscope_nn.spec import Corrupt, Fit, Train, Vector

#: How each library gives a number, and several.
ONE = {
    "numpy": np.int64,
    "numpy, small and unsigned": np.uint8,
    "a numpy array without axes": np.array,
    "torch": torch.tensor,
    "pandas": lambda number: pd.Series([number]).iloc[0],
}
SEVERAL = {
    "numpy": np.array,
    "torch": torch.tensor,
    "pandas, a column": pd.Series,
    "pandas, an index": pd.Index,
    "a list of numpy": lambda numbers: [np.int32(number) for number in numbers],
    "a tuple of torch": lambda numbers: tuple(torch.tensor(number) for number in numbers),
}
S = {"prompt": "The Eiffel Tower"}

TAKES_ONE = {
    "layer": (lambda n: ps.Source(**S, layer=n), 2),
    "target layer": (lambda n: ps.Target(layer=n), 2),
    "position": (lambda n: ps.Source(**S, position=n), 2),
    "span": (lambda n: ps.Source(**S, position=ps.Span(start=n, end=n)), 2),
    "span as a mapping": (lambda n: ps.Source(**S, position={"start": n}), 2),
    "window": (lambda n: ps.Target(window=n), 2),
    "scale": (lambda n: ps.Target(scale=n), 2),
    "blend": (lambda n: ps.Target(write={"blend": n}), 1),
    "noise": (lambda n: Corrupt(position=n, noise=n, samples=n), 2),
    "vector": (lambda n: Vector(file="x", index=n), 2),
    "top_k": (lambda n: ps.NextToken(top_k=n, position=n), 2),
    "generation": (lambda n: ps.Generate(max_new_tokens=n, seed=n, temperature=n), 2),
    "a readout as a mapping": (
        lambda n: ps.Patchscope(source=ps.Source(**S), readout={"next_token": {"top_k": n}}),
        2,
    ),
    "fit": (lambda n: Fit(positions=n, rank=n, seed=n, kind="low_rank"), 2),
    "train": (lambda n: Train(kind="tuned_lens", steps=n, seed=n), 2),
    "recipe": (lambda n: ps.Recipe(name="a", title="a", source=S, seed=n), 2),
    "data": (lambda n: ps.Recipe(name="a", title="a", source=S, data={"rows": [{"n": n}]}), 2),
}
TAKES_SEVERAL = {
    "layers": lambda ns: ps.Source(**S, layer=ns),
    "positions": lambda ns: ps.Source(**S, position=ns),
    "each": lambda ns: ps.Source(**S, position=ps.Each(ns)),
    "each as a mapping": lambda ns: ps.Source(**S, position={"each": ns}),
    "token ids": lambda ns: ps.Source(prompt=ns),
    "several prompts": lambda ns: ps.Target(prompts=[ns, "x"]),
    "scales": lambda ns: ps.Target(scale=ns),
    "lambdas": lambda ns: Fit(lambdas=ns),
}


@pytest.mark.parametrize("kind", ONE)
@pytest.mark.parametrize("name", TAKES_ONE)
def test_a_number_of_any_library_is_the_same_number(name, kind):
    make, number = TAKES_ONE[name]
    assert make(ONE[kind](number)) == make(number)
    assert json.dumps(make(ONE[kind](number)).model_dump(mode="json")) == json.dumps(
        make(number).model_dump(mode="json")
    )


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("name", TAKES_SEVERAL)
def test_several_numbers_of_any_library_are_a_list(name, kind):
    make = TAKES_SEVERAL[name]
    assert make(SEVERAL[kind]([1, 2])) == make([1, 2])


def test_scales_are_floats_of_any_library():
    assert ps.Target(scale=np.linspace(0.5, 1, 2)).scale == (0.5, 1.0)
    assert ps.Target(scale=torch.tensor(0.5)).scale == (0.5,)


def test_a_run_takes_numbers_of_any_library(tiny_model):
    scope = ps.Patchscope(
        source=ps.Source(prompt="{text}", layer=torch.arange(2)), target=ps.Target(prompt="The")
    )
    rows = [{"text": "The Eiffel"}, {"text": "the city"}]
    run = ps.run(
        scope,
        model=tiny_model(),
        data=rows,
        controls=["random"],
        limit=np.int64(1),
        seed=torch.tensor(3),
        max_rows=np.uint8(1),
        memory=np.int64(2**30),
        jobs=pd.Series([2]).iloc[0],
    )
    plainly = ps.run(scope, model=tiny_model(), data=rows, controls=["random"], limit=1, seed=3, max_rows=1)
    assert run.table().equals(plainly.table())
    assert run.manifest["hash"] == plainly.manifest["hash"]
    assert json.dumps(run.manifest["recipe"]) == json.dumps(plainly.manifest["recipe"])


def test_a_quick_look_and_a_fit_take_them_too(tiny_model, monkeypatch):
    monkeypatch.setattr(ps.prompts, "DESCRIBE", "The city x")
    look = ps.explain("The city", model=tiny_model(), layer=np.arange(2), max_new_tokens=np.int64(1))
    assert [one.layer for one in look.says] == [None, 0, 1]
    fitted = ps.fit(
        "tuned_lens",
        model=tiny_model(),
        data=[{"text": f"The Eiffel Tower is in {letter}"} for letter in "abcdefgh"],
        layers=np.arange(2),
        training=Training(steps=np.int64(1)),
    )
    assert fitted.pairs == ((0, 3), (1, 3))


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(data=True), [True, False], np.array([True])], ids=repr
)
def test_a_boolean_is_no_number(value):
    for make in (
        lambda: ps.Source(**S, layer=value),
        lambda: ps.Source(**S, position=value),
        lambda: ps.Source(prompt=value),
        lambda: ps.Target(scale=value),
        lambda: ps.Target(window=value),
        lambda: ps.NextToken(top_k=value),
        lambda: ps.Span(start=value),
    ):
        with pytest.raises(SpecError):
            make()


@pytest.mark.parametrize("name", ["limit", "seed", "max_rows", "memory", "jobs"])
def test_a_boolean_is_no_number_of_a_run(tiny_model, name):
    scope = ps.Patchscope(source=ps.Source(**S))
    with pytest.raises(SpecError, match=f"{name}: should be a whole number.*; given True"):
        ps.run(scope, model=tiny_model(), **{name: True})


def test_what_is_no_number_stays_what_it_is():
    thing = object()
    given = {"a": [thing, (1, "b")], "c": range(3), "d": None}
    assert plain(given) == given
    assert plain(given)["a"][0] is thing


def test_a_recipe_of_numpy_numbers_is_written_as_yaml_writes_it():
    recipe = ps.Recipe(name="a", title="a", source={"prompt": np.array([3, 4]), "layer": np.int64(1)})
    assert resolved(recipe)["source"]["prompt"] == [3, 4]
