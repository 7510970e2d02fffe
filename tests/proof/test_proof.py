"""Proof at load: a fault is found, what it makes wrong is off and told, and the numbers are right."""

from __future__ import annotations

import functools
import logging
import logging.handlers

import faults
import hooks
import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.errors import InputError, ModelError
from patchscope_nn.models import COSTS
from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target

ROWS = (
    {"s": "The Eiffel Tower is in", "t": "The city of x is", "a": " Paris"},
    {"s": "Diana", "t": "The city of the Tower is x in", "a": " the city"},
)
READOUTS = {
    "next_token": NextToken(top_k=3),
    "generate": Generate(max_new_tokens=4),
    "choices": Choices(["{a}", " Diana of Paris"]),
    "hidden": Hidden(),
}
faulty = pytest.mark.parametrize("name", faults.FAULTS)


pytestmark = pytest.mark.usefixtures("verdicts")


@pytest.fixture
def plant(monkeypatch):
    """plant(name): the fault, planted."""

    def plant(name):
        faults.FAULTS[name].plant(monkeypatch)
        return faults.FAULTS[name]

    return plant


def load(family, **options):
    return ps.load(tiny.make_module(family), tokenizer=tiny.TOKENIZER, **options)


def scope_of(readout):
    return Patchscope(
        source=Source(prompt="{s}", position=-2, layer=[0, 2]),
        target=Target(prompt="{t}", position="x", layer=[0, 1, -1]),
        readout=readout,
    )


def off(model):
    return {entry.optimisation for entry in model.info.verdict.withheld}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_is_off_for_a_model_that_is_compiled_correctly(family, caplog):
    model = load(family)
    assert model.info.verdict.withheld == ()
    assert model.info.verdict.limit is None
    assert model.info.verdict.causal
    assert not caplog.records


@pytest.fixture(scope="module")
def proven_with():
    """proven_with(fault's name), while it is planted: a model with its proof, and what this logged."""

    @functools.cache
    def get(name):
        logged = logging.handlers.BufferingHandler(capacity=100)
        logged.setLevel(logging.WARNING)
        logger = logging.getLogger("patchscope_nn")
        logger.addHandler(logged)
        try:
            return load(faults.FAULTS[name].family), logged.buffer
        finally:
            logger.removeHandler(logged)

    return get


@faulty
def test_a_fault_is_found_and_what_it_makes_wrong_is_off(name, plant, proven_with):
    fault = plant(name)
    model, (record,) = proven_with(name)
    assert off(model) == fault.wrong
    assert record.levelno == logging.WARNING
    for wrong in fault.wrong:
        assert wrong.replace("_", "-") in record.getMessage()
        assert COSTS[wrong] in record.getMessage()


def differing(model, family, run_cells, **options):
    """The cells of every readout that differ from plain hooks."""
    for readout in READOUTS.values():
        scope = scope_of(readout)
        pair = hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
        for cell, given in run_cells(scope, model, rows=ROWS, controls=["unpatched"], **options):
            try:
                hooks.assert_same(given, pair.expected(cell, ROWS[cell.row]))
            except AssertionError:
                yield cell


@pytest.mark.parametrize("name", sorted(set(faults.FAULTS) - {"fused"}))
def test_numbers_are_right_in_spite_of_a_fault_and_wrong_without_the_proof(
    name, plant, proven_with, run_cells
):
    fault = plant(name)
    (proven, _), unproven = proven_with(name), load(fault.family, proof=False)
    assert not [*differing(proven, fault.family, run_cells)]
    assert [*differing(unproven, fault.family, run_cells)]


class Mixing(torch.nn.Module):
    """An MLP that adds something of the whole batch to every row."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        output = self.inner(hidden)
        return output + 0.3 * output.mean(0, keepdim=True)


def test_a_model_whose_rows_see_each_other_runs_each_alone(run_cells):
    modules = [tiny.make_module("llama") for _ in range(2)]
    for module in modules:
        module.model.layers[1].mlp = Mixing(module.model.layers[1].mlp)
    model = ps.load(modules[0], tokenizer=tiny.TOKENIZER)
    assert off(model) == {"source_sharing", "row_packing"}
    assert model.info.verdict.causal
    scope = scope_of(READOUTS["next_token"])
    plain = hooks.Reference(modules[1], blocks="model.layers", attention="self_attn", mlp="mlp")
    pair = hooks.Pair(scope, plain, tokenizer=tiny.TOKENIZER)
    for cell, given in run_cells(scope, model, rows=ROWS, controls=["unpatched"]):
        hooks.assert_same(given, pair.expected(cell, ROWS[cell.row]))


@faulty
def test_the_manifest_says_what_is_off(name, plant, proven_with, tmp_path):
    fault = plant(name)
    model, _ = proven_with(name)
    readout = READOUTS["generate" if fault.wrong & {"early_leaving", "cached_decoding"} else "next_token"]
    run = ps.run(scope_of(readout), model=model, data=list(ROWS), out=tmp_path / "run")
    for wrong in fault.wrong:
        assert any(line.startswith(wrong.replace("_", "-")) for line in run.manifest["plan"]["withheld"])
        proof = run.manifest["models"]["target"]["proof"]
        assert any(entry["optimisation"] == wrong and entry["why"] for entry in proof["withheld"])


def test_a_plan_says_why_an_optimisation_is_off_and_keeps_the_others(plant, run_cells):
    from patchscope_nn.plan import plan
    from patchscope_nn.sweep import expand

    plant("windows")
    model = load("mistral")
    sweep = expand(scope_of(READOUTS["next_token"]), rows=ROWS, source=model, target=model)
    planned = plan(sweep)
    wrong = {"prefix_sharing", "late_entry"}
    used = {name for name in Optimisations.names() if getattr(planned.optimisations, name)}
    assert used == set(Optimisations.names()) - wrong
    for name in wrong:
        (line,) = (line for line in str(planned).splitlines() if f"note: {name.replace('_', '-')}" in line)
        assert "is off (next_token differs by" in line
        assert f"standard deviations), so {COSTS[name]}" in line
    # What a user switches off is no news.
    asked = plan(sweep, optimisations=Optimisations(prefix_sharing=False))
    assert {entry.optimisation for entry in asked.withheld} == {"late_entry"}


def test_every_step_is_refused_where_decoding_from_keys_and_values_is_wrong(plant):
    plant("cache")
    target = Target(prompt="{t}", position="x", layer=1, every_step=True)
    scope = Patchscope(
        source=Source(prompt="{s}", layer=1), target=target, readout=Generate(max_new_tokens=3)
    )
    with pytest.raises(
        InputError, match="every_step decodes from keys and values, which gives wrong results for"
    ):
        ps.run(scope, model=load("llama"), data=list(ROWS))


def test_a_fused_context_that_is_wrong_is_not_chosen_and_is_refused(plant):
    plant("fused")
    scope = Patchscope(
        source=Source(prompt="{s}", layer=1),
        target=Target(prompt="{t}", position="x", layer=2),
        readout=NextToken(top_k=3),
    )
    model, unproven = load("llama"), load("llama", proof=False)
    contexts = ((model, "auto"), (unproven, "session"), (unproven, "fused"))
    tables = [ps.run(scope, model=given, data=list(ROWS), context=context) for given, context in contexts]
    right, same, wrong = ([row["top_ids"] for row in table.rows] for table in tables)
    assert right == same != wrong
    with pytest.raises(InputError, match=r"context='fused' gives wrong results for .*: \w+ differs by"):
        ps.run(scope, model=model, data=list(ROWS), context="fused")


@pytest.mark.quick
@pytest.mark.parametrize("fault", [faults.lost_writes, faults.other_reads])
def test_a_model_that_the_plain_path_gets_wrong_is_refused(fault, monkeypatch, verdicts):
    fault(monkeypatch)
    with pytest.raises(ModelError, match="even without any optimisation, next_token differs by") as caught:
        load("llama")
    assert "LlamaForCausalLM" in str(caught.value)
    assert not verdicts.exists()


def test_a_site_that_is_wrong_is_refused_where_it_is_asked_for(monkeypatch):
    """A module that adds to what it gives in place after its hooks have run."""
    from patchscope_nn.lower import step

    true = step.paths_of

    def other(info, site):
        return true(info, "mlp" if site == "attention" else site)

    monkeypatch.setattr(step, "paths_of", other)
    model = load("llama")
    assert off(model) == {"attention"}
    for sites in ({"source": "attention"}, {"target": "attention"}):
        scope = Patchscope(
            source=Source(prompt="{s}", layer=1, site=sites.get("source", "residual")),
            target=Target(prompt="{t}", position="x", layer=2, site=sites.get("target", "residual")),
            readout=NextToken(top_k=3),
        )
        message = "site='attention': reads and writes at this site give wrong results for"
        with pytest.raises(InputError, match=message):
            ps.run(scope, model=model, data=list(ROWS))


def test_an_unproven_model_says_so(tmp_path):
    model = load("llama", proof=False)
    assert model.info.verdict is None
    run = ps.run(scope_of(READOUTS["hidden"]), model=model, data=list(ROWS), out=tmp_path / "run")
    assert run.manifest["models"]["source"]["proof"] == "skipped"
    assert run.manifest["plan"]["withheld"] == []
