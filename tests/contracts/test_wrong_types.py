"""Every public call with a wrong type for each parameter: it works, or raises the package's own error."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import patchscope_nn as ps
from patchscope_nn.errors import SpecError
from patchscope_nn.fitting import fit_mapping, fit_trained
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.spec import MLP

WRONG: dict[str, Any] = {
    "None": None,
    "5": 5,
    "-1": -1,
    "text": "x",
    "3.5": 3.5,
    "nan": float("nan"),
    "True": True,
    "an empty list": [],
    "a list": [None],
    "an empty mapping": {},
    "a mapping": {"x": 1},
    "an object": object(),
    "an array": np.zeros((2, 3)),
    "bytes": b"x",
}
ROWS = [{"text": f"The Eiffel Tower is in {letter}"} for letter in "abcdefgh"]
RECIPE = {"name": "a", "source": {"prompt": "The city", "layer": 1}}
METHODS = RECIPE | {
    "readout": {"next_token": {"reference": "source"}},
    "metrics": ["nll_nats"],
    "methods": {"one": {}, "two": {"source.layer": 2}},
}
S = ps.Source(prompt="The city", layer=1)
SCOPE = ps.Patchscope(source=S)
SPACE = {"name": "a", "d_model": 2}
SPACES = {"source_model": ps.Space(**SPACE), "target_model": ps.Space(**SPACE)}
MAPS = {"kind": "affine", "maps": {(0, 1): {"weight": torch.eye(2)}}, "about": ps.Provenance(**SPACES)}
#: What functions take beside what their signatures name.
MODELS = ("model", "source_model", "target_model", "dtype", "device_map")
RUN = (
    *MODELS,
    "remote",
    "source_remote",
    "context",
    "max_rows",
    "memory",
    "optimisations",
    "jobs",
    "progress",
)
RUN += ("data", "controls", "columns", "metrics", "seed", "limit", "shard", "reuse", "base")
FIT = (
    *inspect.signature(fit_mapping).parameters,
    "column",
    "limit",
    "positions",
    "max_tokens",
    "rank",
)
FIT += ("lambdas", "seed")
TRAIN = (*inspect.signature(fit_trained).parameters, "layers", "max_tokens", "skip_first", "training")


def _own(columns, row):
    """A function of the user's, to register."""
    return len(columns)


class Call(NamedTuple):
    """A public call that works: what is called, with what, and the options its signature does not name."""

    function: Any
    given: dict[str, Any]
    more: tuple[str, ...] = ()


CONSTRUCTORS = {
    "Affine": {"weight": torch.eye(2)},
    "Choices": {"continuations": ["a", "b"]},
    "Each": {"each": [1]},
    "Experiment": {"title": "a", "runs": {}},
    "Fitted": MAPS,
    "Generate": {},
    "Hidden": {},
    "NextToken": {},
    "Optimisations": {},
    "Patchscope": {"source": S},
    "Provenance": SPACES,
    "Recipe": RECIPE,
    "Run": {"manifest": {}, "rows": []},
    "Site": {"name": "x"},
    "Source": {"prompt": "x"},
    "Space": SPACE,
    "Span": {"start": 1},
    "Target": {},
}


@pytest.fixture(scope="module")
def calls(tiny_model, tmp_path_factory) -> dict[str, Call]:
    """Every public call, by name."""
    model, place = tiny_model(), tmp_path_factory.mktemp("calls")
    run = ps.run(SCOPE, model=model, out=place / "run")
    ps.run(SCOPE, model=model, shard="1/1", out=place / "shard")
    methods = ps.Recipe(**METHODS)
    experiment = ps.run(methods, model=model)
    recipe, maps, page = place / "recipe.yaml", place / "maps.safetensors", {"path": place / "page.html"}
    recipe.write_text('name: a\nsource: {prompt: "The city", layer: 1}\n')
    figures = {"folder": place / "figures", "formats": ()}
    fitted = ps.Fitted(**MAPS)
    fitted.save(maps)
    scale = {"kind": "scale", "model": model, "pairs": "1:2", "data": ROWS}
    lens = {"kind": "tuned_lens", "model": model, "layers": [1], "data": ROWS, "training": Training(steps=1)}
    look = {"prompt": "The city", "layer": 1, "max_new_tokens": 1, "model": model}
    return {name: Call(getattr(ps, name), given) for name, given in CONSTRUCTORS.items()} | {
        "Model": Call(ps.Model, {"info": model.info, "tokenizer": model.tokenizer, "traced": model.traced}),
        "Affine.load": Call(ps.Affine.load, {"file": maps}),
        "Experiment.compare": Call(experiment.compare, {}),
        "Experiment.report": Call(experiment.report, page),
        "Experiment.save_figures": Call(experiment.save_figures, figures),
        "Fitted.parts": Call(fitted.parts, {"pair": (0, 1)}),
        "Fitted.chosen": Call(fitted.chosen, {"pairs": [(0, 1)]}),
        "Fitted.save": Call(fitted.save, {"file": maps}),
        "Fitted.load": Call(ps.Fitted.load, {"file": maps}),
        "Fitted.said": Call(fitted.said, {}),
        "merge": Call(ps.merge, {"runs": [place / "shard"], "out": "merged"}),
        "Optimisations.names": Call(ps.Optimisations.names, {}),
        "Optimisations.none": Call(ps.Optimisations.none, {}),
        "Provenance.dump": Call(fitted.about.dump, {}),
        "Recipe.of_methods": Call(methods.of_methods, {}),
        "Run.table": Call(run.table, {}),
        "Run.light_table": Call(run.light_table, {}),
        "Run.heatmap": Call(run.heatmap, {}),
        "Run.ensemble": Call(run.ensemble, {}),
        "Run.summary": Call(run.summary, {}),
        "Run.report": Call(run.report, page),
        "Run.save_figures": Call(run.save_figures, figures),
        "register_readout": Call(ps.register_readout, {"kind": ps.Hidden}),
        "register_site": Call(ps.register_site, {"site": MLP}),
        "Space.of": Call(ps.Space.of, {"info": model.info}),
        "column": Call(ps.column, {"function": _own}),
        "mapping": Call(ps.mapping, {"function": _own}),
        "metric": Call(ps.metric, {"function": _own}),
        "reader": Call(ps.reader, {"function": _own}),
        "explain": Call(ps.explain, look, MODELS),
        "fit": Call(ps.fit, scale, FIT),
        "fit, trained": Call(ps.fit, lens, TRAIN),
        "load": Call(ps.load, {"model": model}),
        "load_recipe": Call(ps.load_recipe, {"name_or_path": recipe}),
        "load_run": Call(ps.load_run, {"path": place / "run"}),
        "run": Call(ps.run, {"scope": SCOPE, "model": model}, RUN),
        "run, a file": Call(ps.run, {"scope": recipe, "model": model}, RUN),
        "run, methods": Call(ps.run, {"scope": methods, "model": model}, RUN),
    }


def parameters(call: Call) -> dict[str, Any]:
    """The parameters of a call with their defaults."""
    named = inspect.signature(call.function).parameters.values()
    own = {one.name: one.default for one in named if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    return dict.fromkeys(name for name in call.more if name != "options") | own


#: `forward` is torch's; `parse` reads back what `dump` wrote, and says what it raises; `Readout` is a base
#: class.
LEFT_OUT = {"Affine.forward", "Fitted.forward", "Provenance.parse", "Readout"}
#: Methods of the contract of readouts, which only the package calls.
CONTRACT = {"lower", "tabulate", "check_target"}


def public() -> set[str]:
    """The public functions, classes, and their own public methods."""
    things = {name: getattr(ps, name) for name in ps.__all__ if name not in ("prompts", "fit")}
    classes = {
        name: thing
        for name, thing in things.items()
        if inspect.isclass(thing) and not issubclass(thing, Exception)
    }
    methods = {
        f"{name}.{method}"
        for name, kind in classes.items()
        for method, member in vars(kind).items()
        if not method.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod))
        if not (issubclass(kind, ps.Readout) and method in CONTRACT)
    }
    functions = {name for name, thing in things.items() if inspect.isfunction(thing)}
    return (functions | {"fit"} | set(classes) | methods) - LEFT_OUT


def test_every_public_call_is_here(calls):
    assert {name.partition(",")[0] for name in calls} == public()


@pytest.mark.parametrize(
    "name", sorted({*CONSTRUCTORS, *public(), "fit, trained", "run, a file", "run, methods"})
)
def test_a_wrong_type_is_told_in_the_package_s_own_words(calls, name, monkeypatch, tmp_path, registries):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ps.prompts, "DESCRIBE", "The city x")  # what the tiny tokenizer makes short
    call, wrong = calls[name], []
    for parameter, default in parameters(call).items():
        for label, value in WRONG.items():
            if value is None and default is None:
                continue
            try:
                call.function(**call.given | {parameter: value})
            except ps.PatchscopeError:
                pass
            except Exception as error:  # noqa: BLE001 (these are what is looked for)
                wrong.append(f"{parameter}={label}: {type(error).__name__}: {error}")
    assert wrong == []


def test_the_words(tiny_model):
    with pytest.raises(SpecError) as caught:
        ps.run(SCOPE, model=tiny_model(), context="x", max_rows=2.5, progress=5, out=b"x", limit="3")
    assert str(caught.value) == (
        "run: 5 problems\n"
        "  out: should be a text, a path or None; given b'x'\n"
        "  context: should be 'fused', 'session', 'nested', 'bridged' or 'auto'; given 'x'\n"
        "  max_rows: should be a whole number or None; given 2.5\n"
        "  progress: should be a function or None; given 5\n"
        "  limit: should be a whole number or None; given '3'"
    )
    with pytest.raises(SpecError) as caught:
        ps.run(SCOPE, model=tiny_model(), controls="random")
    assert str(caught.value) == (
        "run: controls: should be a list of 'unpatched', 'random', 'shuffled' or 'text-only' or None; given "
        "'random'"
    )


def test_an_unknown_keyword_is_pythons_own_error(tiny_model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'limits'"):
        ps.run(SCOPE, model=tiny_model(), limits=3)
