"""Every kind of readout keeps the contract, and so does a kind of a user's own."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.errors import InputError, SpecError
from patchscope_nn.recipe import lint
from patchscope_nn.runs.conformance import check_readout
from patchscope_nn.spec import readout_kinds, readout_registry
from patchscope_nn.spec.readout_registry import READOUTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def max_logit():
    """The worked example's module; what this file registers is forgotten afterwards."""
    kinds, named = dict(readout_registry._KINDS), dict(readout_registry.NAMED)
    yield importlib.import_module("max_logit")
    del sys.modules["max_logit"]
    for known, before in ((readout_registry._KINDS, kinds), (readout_registry.NAMED, named)):
        known.clear()
        known.update(before)
    READOUTS._homes.pop("max_logit", None)


COLUMNS = {"a": " Paris", "b": " the city of"}


def ids_of(text):
    return tiny.TOKENIZER(text, add_special_tokens=False)["input_ids"]


def text_of(ids):
    return tiny.TOKENIZER.decode(ids)


def next_token(cell):
    logprobs, source = (torch.log_softmax(one, -1) for one in (cell.logits([])[-1], cell.source_logits))
    top = logprobs.topk(3)
    return {
        "top_ids": top.indices.tolist(),
        "top_tokens": [text_of([token]) for token in top.indices.tolist()],
        "top_probs": top.values.exp().tolist(),
        "entropy_nats": -(logprobs.exp() * logprobs).sum().item(),
        "reference_ids": [source.argmax().item()],
        "surprisal_nats": -source[top.indices[0]].item(),
        "nll_nats": -logprobs[source.argmax()].item(),
        "kl_nats": (source.exp() * (source - logprobs)).sum().item(),
    }


def generated(cell):
    ids = []
    for _ in range(4):
        ids.append(cell.logits(ids)[-1].argmax().item())
        if ids[-1] == tiny.EOS_ID:
            ids.pop()
            break
    places = range(len(ids))
    patched, unpatched = (
        torch.softmax(run(ids[:-1]), -1)[places, ids].tolist() if ids else []
        for run in (cell.logits, cell.unpatched)
    )
    return {"text": text_of(ids), "token_probs": patched, "unpatched_token_probs": unpatched}


def chosen(cell):
    texts = (" Paris", " the city of")
    logprobs = []
    for ids in map(ids_of, texts):
        rows = torch.log_softmax(cell.logits(ids[:-1]), -1)
        logprobs.append(rows[range(len(ids)), ids].sum().item())
    probs = torch.softmax(torch.tensor(logprobs), -1).tolist()
    best = texts[logprobs.index(max(logprobs))]
    return {"choices": list(texts), "choice_logprobs": logprobs, "choice_probs": probs, "choice": best}


def states(cell):
    return {"hidden": [cell.written.tolist()], "clean": [cell.replaced.tolist()]}


def largest(cell):
    value, token = cell.logits([])[-1].max(-1)
    return {"max_logit": 2 * value.item(), "max_token": text_of([token.item()])}


EXAMPLES = {
    "next_token": (ps.NextToken(top_k=3, reference="source"), next_token),
    "named_reference": (ps.NextToken(reference=["{a}", " is"], position=-2), None),
    "generate": (ps.Generate(max_new_tokens=4, relevancy=True), generated),
    "sampled": (ps.Generate(max_new_tokens=4, temperature=1.0, stop="a"), None),
    "choices": (ps.Choices(["{a}", "{b}"]), chosen),
    "hidden": (ps.Hidden(clean=True), states),
    "max_logit": ({"max_logit": {"scale": 2.0}}, largest),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_kind_keeps_the_contract(example, tiny_model):
    given, expected = EXAMPLES[example]
    readout = ps.Patchscope(source=ps.Source(prompt="x"), readout=given).readout
    check_readout(readout, model=tiny_model(), expected=expected, columns=COLUMNS)


@pytest.mark.quick
def test_every_kind_that_ships_is_tried():
    shipped = {name for name, kind in readout_kinds().items() if kind.__module__.startswith("patchscope_nn.")}
    assert shipped == {readout.name for readout, _ in EXAMPLES.values() if isinstance(readout, ps.Readout)}


def test_the_worked_example_is_the_one_in_the_documentation():
    page = (ROOT / "docs" / "extending" / "readout.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python title=\"max_logit.py\"\n(.*?)```", page, flags=re.DOTALL)
    assert code == (ROOT / "tests" / "readouts" / "max_logit.py").read_text(encoding="utf-8")


def test_a_users_kind_shows_in_recipe_table_figures_and_report(tiny_model, tmp_path):
    file = tmp_path / "largest.yaml"
    file.write_text(
        "name: largest\nsource: {prompt: The Tower}\ntarget: {prompt: The city x, position: -1}\n"
        "readout: {max_logit: {scale: 2}}\n"
    )
    assert lint(file) == []
    run = ps.run(file, model=tiny_model(), out=tmp_path / "run")
    table = ps.load_run(tmp_path / "run").table()
    assert [*table["max_token"]] == [*run.table()["max_token"]]
    assert table["max_logit"].dtype == "float64"
    assert "Token of the largest logit" in run.heatmap().layout.title.text
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "then gave each token a logit" in report
    assert "max logit" in report or "max_logit" in report


def test_a_kind_whose_body_looks_at_other_rows_is_found_out(tiny_model, monkeypatch, max_logit):
    def leaking(run, *, scale):
        best = run.logits.float().max().item()
        return {"max_id": [0] * run.n_cells, "max_logit": [scale * best] * run.n_cells}

    monkeypatch.setattr(max_logit, "read_max_logit", leaking)
    with pytest.raises(AssertionError, match="max_logit differs with no optimisation"):
        check_readout(max_logit.MaxLogit(), model=tiny_model())


# The registry.


def kind(**attributes):
    fields = {"body": "max_logit:read_max_logit", "columns": {"mine": "number"}, "__module__": __name__}
    return type("Mine", (ps.Readout,), {**fields, **attributes})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "the readout Mine does not define name"),
        ({"name": "Max Logit"}, "is named 'Max Logit'"),
        ({"name": "generate"}, r"the name 'generate' is taken by patchscope_nn.readouts.generate.Generate"),
        ({"name": "mine", "columns": {}}, "the readout mine has no columns"),
        ({"name": "mine", "columns": {"text": "text"}}, "mine and generate share the column 'text'"),
        (
            {"name": "mine", "columns": {"a": "number", "top_ids": "numbers"}},
            "the column 'top_ids' holds numbers in the readout mine and integers in next_token",
        ),
        ({"name": "mine", "body": "read_max_logit"}, "the body of the readout mine is 'read_max_logit'"),
    ],
)
def test_what_a_kind_lacks_is_said_when_it_is_registered(attributes, message):
    with pytest.raises(InputError, match=message):
        ps.register_readout(kind(**attributes))
    assert "mine" not in readout_kinds()


@pytest.fixture
def installing(monkeypatch):
    """installing(value): an installed package offers a kind; what it registered is forgotten afterwards."""
    kinds, named = dict(readout_registry._KINDS), dict(readout_registry.NAMED)

    def install(value):
        entry = EntryPoint(name="mine", value=value, group=READOUTS.group)
        monkeypatch.setitem(vars(READOUTS), "_points", {"mine": [entry]})
        monkeypatch.setattr(READOUTS, "_all_loaded", False)

    yield install
    READOUTS._homes.pop("mine", None)
    readout_registry._KINDS.clear()
    readout_registry._KINDS.update(kinds)
    readout_registry.NAMED.clear()
    readout_registry.NAMED.update(named)


def test_a_kind_of_an_installed_package_is_known_by_name(installing, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "Mine", kind(name="mine"), raising=False)
    installing(f"{__name__}:Mine")
    scope = ps.Patchscope(source=ps.Source(prompt="x"), readout="mine")
    assert type(scope.readout).__name__ == "Mine"
    assert [*readout_kinds()][-1] == "mine"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("no_such_module:Mine", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("max_logit:read_max_logit", "InputError: it is not a subclass of patchscope_nn.Readout."),
        ("max_logit:MaxLogit", "InputError: the entry point is named 'mine', and the readout 'max_logit'."),
    ],
)
def test_a_package_whose_kind_cannot_be_loaded_is_told_who_asks_for_it(installing, value, problem):
    installing(value)
    assert "mine" not in readout_kinds()
    with pytest.raises(SpecError, match=f"'mine' of the package {value} cannot be loaded: {problem}"):
        ps.Patchscope(source=ps.Source(prompt="x"), readout="mine")


def test_a_body_that_cannot_be_imported_is_said_before_anything_runs(tiny_model, monkeypatch, max_logit):
    monkeypatch.setattr(max_logit.MaxLogit, "body", "no_such_module:read")
    scope = ps.Patchscope(source=ps.Source(prompt="The Tower"), readout="max_logit")
    with pytest.raises(
        InputError, match=r"the body 'no_such_module:read' of the readout max_logit cannot be"
    ):
        ps.run(scope, model=tiny_model())


def test_logits_that_are_not_finite_are_told_of_a_users_kind(tiny_model):
    scope = ps.Patchscope(
        source=ps.Source(prompt="The Tower", layer=0),
        target=ps.Target(prompt="The city x", position=-1),
        mapping=lambda states: states * float("nan"),
        readout="max_logit",
    )
    (row,) = ps.run(scope, model=tiny_model()).rows
    assert row["error"].startswith("the state that was written is not finite")
    assert row["max_logit"] is None


def test_a_kind_is_refused_where_its_body_cannot_travel(monkeypatch):
    from patchscope_nn.backends.ndif.portability import check_travels

    module = type(sys)("readouts_of_mine")
    module.__file__ = "/usr/lib/site-packages/readouts_of_mine.py"
    exec("def read(run):\n    return {'n': [1] * run.n_cells}\n", module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "readouts_of_mine", module)
    with pytest.raises(ps.PatchscopeError, match="the readout's body needs the module 'readouts_of_mine'"):
        check_travels(module.read, what="readout's body")


def test_unknown_fields_and_kinds_are_told_with_those_there_are():
    with pytest.raises(SpecError, match=r"readout.max_logit.scal: is not a field here. Did you mean 'scale'"):
        ps.Patchscope(source=ps.Source(prompt="x"), readout={"max_logit": {"scal": 1}})
    with pytest.raises(SpecError, match=r"'max_lgit' is not a known readout. Did you mean 'max_logit'"):
        ps.Patchscope(source=ps.Source(prompt="x"), readout="max_lgit")
