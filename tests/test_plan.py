"""Plans: every cell once, every source prompt once, budgets kept, states where they are needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscope_nn.backends import backend_for, execute
from patchscope_nn.cells import expand
from patchscope_nn.errors import InputError
from patchscope_nn.mappings import resolve_mapping
from patchscope_nn.models import Model
from patchscope_nn.plan import Optimisations, State, plan
from patchscope_nn.spec import Choices, Generate, Hidden, NextToken, Patchscope, Source, Target

TEXTS = ("The Tower is", "Diana", " Paris", " is in", "The city of Paris is in the", "The Eiffel Tower x ->")
ROW = {"s": "x", "t": "x"}
READOUTS = (
    Hidden(),
    NextToken(),
    NextToken(reference="source"),
    Generate(max_new_tokens=7),
    Choices(["x", " is"]),
)


@pytest.fixture
def model(tiny_model):
    """A model without its weights: a plan needs none."""
    loaded = tiny_model("llama")
    return Model(info=loaded.info, tokenizer=loaded.tokenizer, traced=None)


def scope_of(*, layer="all", target_layer="same", position=-1, readout=None, site="residual"):
    return Patchscope(
        source=Source(prompt="{s}", layer=layer, position=position),
        target=Target(prompt="{t}", layer=target_layer, site=site, position=-1),
        readout=readout or Hidden(),
    )


def sweep_of(model, scope=None, *, rows=None, target=None, controls=()):
    rows = rows or [{"s": TEXTS[0], "t": " x"}, {"s": TEXTS[3], "t": "x ->"}]
    return expand(scope or scope_of(), rows=rows, controls=controls, source=model, target=target or model)


@st.composite
def sweeps(draw, model):
    rows = draw(
        st.lists(
            st.fixed_dictionaries({"s": st.sampled_from(TEXTS), "t": st.sampled_from(TEXTS)}),
            min_size=1,
            max_size=6,
        )
    )
    controls = sorted(draw(st.sets(st.sampled_from(["unpatched", "random"]))))
    if len({row["s"] for row in rows}) > 1 and draw(st.booleans()):
        controls.append("shuffled")
    scope = scope_of(
        layer=draw(st.sampled_from(["all", 0, ["embed", 2]])),
        target_layer=draw(st.sampled_from(["same", [0, 3]])),
        position=draw(st.sampled_from([0, -1, {"each": "all"}])),
        readout=draw(st.sampled_from(READOUTS)),
    )
    return sweep_of(model, scope, rows=rows, controls=controls)


def needs(cell):
    if cell.source_prompt is not None:
        yield State(cell.source_prompt, cell.source_positions, cell.source_layer)
    if cell.reference is not None:
        yield State(cell.reference[0], (cell.reference[1],), None)


def row_width(sweep, cell):
    readout = sweep.scope.readout
    more = {"generate": lambda: readout.max_new_tokens, "choices": lambda: 1}
    return len(sweep.target_prompts[cell.target_prompt].ids) + more.get(readout.name, lambda: 0)()


optimisations = st.builds(
    Optimisations, **dict.fromkeys((one.name for one in fields(Optimisations)), st.booleans())
)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_plan_serves_every_cell_once(data, tiny_model):
    sweep = data.draw(sweeps(tiny_model("llama")))
    budget = {"max_rows": data.draw(st.integers(1, 9)), "max_tokens": data.draw(st.integers(1, 80))}
    done = data.draw(st.sets(st.sampled_from([cell.key for cell in sweep.cells])))
    asked = data.draw(optimisations)
    planned = plan(sweep, context="session", done=done, optimisations=asked, **budget)

    assert planned.cells == tuple(cell for cell in sweep.cells if cell.key not in done)
    served = [cell for step in planned.steps for one in step.targets for cell in one.cells]
    copies = [copy for cell in served for copy in planned.copies.get(cell, ())]
    assert sorted(served + copies) == list(range(len(planned.cells)))
    for cell, others in planned.copies.items():
        assert asked.deduplication
        for other in others:
            same = {"key": "", "row": 0, "reference": None, "control": None}
            assert replace(planned.cells[cell], **same) == replace(planned.cells[other], **same)

    prompts = [prompt for step in planned.steps for one in step.sources for prompt in one.prompts]
    assert sorted(prompts) == sorted({state.prompt for cell in planned.cells for state in needs(cell)})


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_plan_keeps_its_budget(data, tiny_model):
    sweep = data.draw(sweeps(tiny_model("llama")))
    max_rows, max_tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 80))
    asked = data.draw(optimisations)
    planned = plan(sweep, context="session", max_rows=max_rows, max_tokens=max_tokens, optimisations=asked)
    decodes = isinstance(sweep.scope.readout, Generate | Choices)
    for step in planned.steps:
        for one in step.targets:
            widths = [row_width(sweep, planned.cells[cell]) for cell in one.cells]
            assert len(widths) <= max_rows
            assert (one.layout is not None) == asked.packing
            if len(widths) > 1 and one.layout:
                assert one.layout.n_tokens <= max_tokens
            if len(widths) > 1 and (decodes or not one.layout):
                assert max(widths) * len(widths) <= max_tokens
        for one in step.sources:
            assert len(one.prompts) <= max_rows
            assert len(one.prompts) == 1 or planned.source_width(one) * len(one.prompts) <= max_tokens


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_layout_holds_every_token_of_a_cell_once(data, tiny_model):
    """Prefix, trunk up to the branch, and branch are together the cell's prompt."""
    sweep = data.draw(sweeps(tiny_model("llama")))
    planned = plan(sweep, context="session", max_rows=data.draw(st.integers(1, 9)), max_tokens=80)
    for step in planned.steps:
        for one in step.targets:
            segments = one.layout.segments
            assert [segment.offset for segment in segments] == [
                sum(before.last - before.first for before in segments[:place])
                for place in range(len(segments))
            ]
            assert list(segments) == sorted(segments, key=lambda segment: segment.enters)
            for place, cell in enumerate(planned.cells[cell] for cell in one.cells):
                segment = segments[one.layout.of_cell[place]]
                whole = len(sweep.target_prompts[cell.target_prompt].ids)
                assert segment.prompt == cell.target_prompt
                if cell.target_layer is None:
                    assert (segment.first, segment.trunk) == (one.layout.prefix, None)
                    continue
                assert (segment.first, segment.last) == (min(cell.target_positions), whole)
                assert segment.enters == cell.target_layer
                assert segment.first >= one.layout.prefix
                if segment.first > one.layout.prefix and cell.target_layer < tiny.N_LAYERS - 1:
                    trunk = segments[segment.trunk]
                    assert (trunk.prompt, trunk.first) == (segment.prompt, one.layout.prefix)
                    assert trunk.last >= segment.first


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_states_are_read_or_carried_before_they_are_needed(data, tiny_model):
    sweep = data.draw(sweeps(tiny_model("llama")))
    planned = plan(sweep, context="session", max_rows=data.draw(st.integers(1, 4)), max_tokens=40)
    there, wanted = set(), [set() for _ in planned.steps]
    for number, step in enumerate(planned.steps):
        fresh = [state for one in step.sources for state in one.states]
        assert len(set(fresh)) == len(fresh)
        for one in step.sources:
            assert {state.prompt for state in one.states} == set(one.prompts)
        assert set(step.carried) <= there
        assert set(step.kept) <= set(fresh)
        wanted[number] = {
            state for one in step.targets for cell in one.cells for state in needs(planned.cells[cell])
        }
        assert wanted[number] <= set(step.carried) | set(fresh)
        there |= set(step.kept)
    carried = {state for step in planned.steps for state in step.carried}
    assert carried == {state for step in planned.steps for state in step.kept}


def test_many_layers_and_positions_are_one_source_pass(model):
    planned = plan(sweep_of(model, scope_of(position={"each": "all"}), rows=[{"s": TEXTS[4], "t": "x"}]))
    expected = {
        "cells": 28,
        "steps": 1,
        "source_passes": 1,
        "source_rows": 1,
        "source_tokens": 7,
        "states": 28,
        "target_passes": 1,
        "target_rows": 28,
    }
    totals = planned.totals()
    assert {name: totals[name] for name in expected} == expected


def test_padded_rows_of_one_length_go_together(model):
    rows = [{"s": "x", "t": text} for text in ("x", TEXTS[4], "y", "The city of Paris is in Paris")]
    sweep = sweep_of(model, scope_of(layer=[0, 1]), rows=rows)
    planned = plan(sweep, max_rows=4, optimisations=Optimisations(packing=False))
    widths = [planned.target_width(one) for one in planned.steps[0].targets]
    assert widths == [1, 7]
    assert planned.totals()["target_tokens"] == 4 * 1 + 4 * 7


def test_packing_runs_fewer_tokens(model):
    """What is shared is run once: 900 cells of one prompt are one clean prompt and 900 last tokens."""
    scope = scope_of(
        layer=[0, 1, 2, 3], target_layer=[0, 1, 2, 3], position={"each": "all"}, readout=NextToken()
    )
    sweep = sweep_of(model, scope, rows=[{"s": TEXTS[4], "t": TEXTS[4]}])
    packed, padded = (plan(sweep, optimisations=Optimisations(packing=on)).totals() for on in (True, False))
    assert packed["cells"] == padded["cells"] == 7 * 16
    assert padded["target_tokens"] == 7 * 7 * 16
    assert packed["target_tokens"] == 6 + 7 * 16
    assert packed["target_blocks"] == 4 * 6 + 7 * 4 * (3 + 2 + 1 + 0)
    late = plan(sweep, optimisations=Optimisations(late_entry=False)).totals()
    assert late["target_blocks"] == 4 * (6 + 7 * 16)


def test_equal_cells_of_different_rows_run_once(model):
    rows = [ROW, {"s": "y", "t": "x"}, ROW]
    planned = plan(sweep_of(model, rows=rows))
    assert planned.totals()["target_rows"] == 2 * tiny.N_LAYERS
    assert planned.copies == {place: (8 + place,) for place in range(tiny.N_LAYERS)}
    assert plan(sweep_of(model, rows=rows), optimisations=Optimisations(deduplication=False)).copies == {}


@pytest.mark.parametrize("packing", [True, False])
def test_each_source_prompt_is_really_run_once(packing, tiny_model):
    """Counted by hooks: what the model is given, over a run of many steps that share their prompts."""
    model = tiny_model("llama", copy=1)
    rows = [{"s": source, "t": target} for source in TEXTS[:4] for target in ("x", "The x", "x -> x")]
    scope = scope_of(position={"each": [0, -1]}, readout=NextToken(reference="source"))
    sweep = sweep_of(model, scope, rows=rows, controls=["unpatched", "shuffled"])
    planned = plan(
        sweep, context="session", max_rows=5, max_tokens=30, optimisations=Optimisations(packing=packing)
    )
    seen, forwards = Counter(), []

    def count(_module, _args, given):
        forwards.append(len(given["input_ids"]))
        mask = given.get("attention_mask")
        for row, ids in enumerate(given["input_ids"]):
            seen[tuple(ids[mask[row].bool()].tolist() if mask is not None else ids.tolist())] += 1

    hook = model.module.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        mapping = resolve_mapping("identity", source=model.info, target=model.info)
        backend = backend_for(remote=False)
        steps = execute(planned, source=model, target=model, mapping=mapping, backend=backend)
        ran = [cell.key for step in steps for cell, _ in step]
    finally:
        hook.remove()
    totals = planned.totals()
    assert totals["steps"] > 3
    assert sorted(ran) == sorted(cell.key for cell in sweep.cells)
    for text in TEXTS[:4]:
        assert seen[tuple(tiny.TOKENIZER(text)["input_ids"])] == 1
    prefixes = sum(step.prefix is not None for step in planned.steps)
    assert len(forwards) == totals["source_passes"] + totals["target_passes"] + prefixes
    if packing:
        assert sum(forwards) == totals["source_rows"] + totals["target_passes"] + prefixes
    else:
        assert sum(forwards) == totals["source_rows"] + totals["target_rows"]


def test_the_digest_is_of_what_will_run(model):
    base = plan(sweep_of(model), max_rows=3)
    assert base.digest == plan(sweep_of(model), max_rows=3).digest
    assert len({base.digest, plan(sweep_of(model), max_rows=2).digest, plan(sweep_of(model)).digest}) == 3
    assert base.digest != plan(sweep_of(model, scope_of(layer=[0, 1])), max_rows=3).digest
    done = [base.cells[0].key]
    assert base.digest != plan(sweep_of(model), max_rows=3, done=done).digest


def test_a_plan_can_be_read(model):
    planned = plan(sweep_of(model))
    assert planned.digest in str(planned)
    assert str(planned).count("\n") > 3
    assert str(plan(sweep_of(model), done=[cell.key for cell in planned.cells]))


def test_nothing_left_to_do(model):
    sweep = sweep_of(model)
    planned = plan(sweep, done=[cell.key for cell in sweep.cells])
    assert (planned.cells, planned.steps) == ((), ())
    assert set(planned.totals().values()) == {0}


@pytest.mark.parametrize(
    ("layer", "target_layer", "context"),
    [
        pytest.param([0, 1], [2, 3], "fused", id="in order"),
        pytest.param("all", "same", "fused", id="same"),
        pytest.param(["embed", 0], [0, 3], "fused", id="embed"),
        pytest.param([3], [0], "session", id="backwards"),
        pytest.param([0, 2], [1, 3], "session", id="one backwards"),
        pytest.param("all", [3, 2, 1, 0], "session", id="many"),
    ],
)
def test_few_cells_in_order_are_fused(layer, target_layer, context, model):
    sweep = sweep_of(model, scope_of(layer=layer, target_layer=target_layer))
    assert {step.context for step in plan(sweep).steps} == {context}


def test_many_cells_are_a_session(model):
    sweep = sweep_of(model, rows=[{"s": TEXTS[0], "t": text} for text in TEXTS[:3]])
    assert {step.context for step in plan(sweep).steps} == {"session"}
    assert {step.context for step in plan(sweep, context="fused").steps} == {"fused"}


def test_a_site_that_a_forward_has_passed_is_not_fused(model):
    """A block's attention comes before its output, so a read may come too late for another cell's write."""
    sweep = sweep_of(model, scope_of(layer=[0, 1], target_layer=[1, 2], site="attention"), rows=[ROW])
    layers = {(cell.source_layer, cell.target_layer): cell.key for cell in sweep.cells}
    assert {step.context for step in plan(sweep).steps} == {"session"}
    for done, context in {((1, 1), (1, 2)): "fused", ((0, 2), (1, 1)): "session"}.items():
        left = plan(sweep, done=[layers[pair] for pair in done])
        assert {step.context for step in left.steps} == {context}


def test_fused_is_refused_where_a_state_comes_too_late(model):
    sweep = sweep_of(model, scope_of(layer=[0, 2], target_layer=[1, 3]))
    with pytest.raises(InputError) as raised:
        plan(sweep, context="fused")
    assert str(raised.value) == (
        "context='fused' runs source and target in one forward, where the state of layer 2 cannot be written "
        "at layer 1, which came before it. Use context='session' (or 'auto'), or layers with l <= l*."
    )


def test_fused_is_refused_where_the_cells_do_not_fit(model):
    with pytest.raises(InputError) as raised:
        plan(sweep_of(model), context="fused", max_rows=3)
    assert str(raised.value) == (
        "context='fused' runs all cells in one forward, and these do not fit in one. "
        "Use context='session' (or 'auto'), fewer cells, or a larger max_rows and max_tokens."
    )


@pytest.mark.parametrize(
    ("two", "remote", "context", "message"),
    [
        (False, False, "nested", "context='nested' does not serve one model. Use session or fused, or auto."),
        (
            False,
            False,
            "bridged",
            "context='bridged' does not serve one model. Use session or fused, or auto.",
        ),
        (
            True,
            False,
            "session",
            "context='session' does not serve two models. Use nested or bridged, or auto.",
        ),
        (True, False, "fused", "context='fused' does not serve two models. Use nested or bridged, or auto."),
        (
            True,
            True,
            "nested",
            "context='nested' does not serve two models behind a remote backend. Use bridged, or auto.",
        ),
    ],
)
def test_contexts_that_do_not_serve(two, remote, context, message, model):
    target = replace(model, info=replace(model.info)) if two else None
    with pytest.raises(InputError) as raised:
        plan(sweep_of(model, target=target), context=context, remote=remote)
    assert str(raised.value) == message


@pytest.mark.parametrize(("remote", "context"), [(False, "nested"), (True, "bridged")])
def test_two_models_choose_their_context(remote, context, model):
    target = replace(model, info=replace(model.info))
    planned = plan(sweep_of(model, target=target), remote=remote)
    assert {step.context for step in planned.steps} == {context}


@pytest.mark.parametrize("budget", [{"max_rows": 0}, {"max_tokens": 0}])
def test_a_budget_is_at_least_one(budget, model):
    with pytest.raises(InputError, match="should both be at least 1"):
        plan(sweep_of(model), **budget)
