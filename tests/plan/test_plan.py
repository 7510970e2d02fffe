"""Plans: every cell once, every source prompt once, budgets kept, states where they are needed."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscope_nn.backends import Places, run_steps
from patchscope_nn.errors import InputError
from patchscope_nn.mappings import resolve_mapping
from patchscope_nn.models import Model
from patchscope_nn.plan import Budget, Optimisations, count, from_cache, order, plan, stages
from patchscope_nn.plan.budget import Costs
from patchscope_nn.plan.count import source_width, target_width
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import ATTENTION, Patchscope, Source, Target
from patchscope_nn.sweep import expand

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
    if cell.source is not None:
        yield cell.source, cell.source_positions, cell.source_layer
    if cell.reference is not None:
        yield cell.reference[0], (cell.reference[1],), None


def named(sweep, states):
    """States as (prompt, positions, layer), with None for the layer of a distribution."""
    numbers = sweep.states
    return [
        (*sweep.cells.origins[origin], None if final else layer)
        for origin, layer, final in zip(
            numbers.origin(states), numbers.layer(states).tolist(), numbers.is_final(states), strict=True
        )
    ]


optimisations = st.builds(Optimisations, **dict.fromkeys(Optimisations.names(), st.booleans()))


@pytest.mark.quick
@settings(max_examples=80)
@given(data=st.data())
def test_a_plan_serves_every_cell_once(data, tiny_model):
    sweep = data.draw(sweeps(tiny_model("llama")))
    budget = {"max_rows": data.draw(st.integers(1, 9)), "memory": data.draw(st.integers(1, 10**6))}
    done = data.draw(st.sets(st.integers(0, len(sweep.cells) - 1)))
    asked = data.draw(optimisations)
    planned = plan(sweep, context="session", done=done, optimisations=asked, **budget)

    steps = list(planned.steps())
    served = [cell.number for step in steps for cell in step.cells]
    for step in steps:
        assert sorted(cell for one in step.targets for cell in one.cells) == list(range(len(step.cells)))
    copies = planned.copies(np.array(served, int))[0].tolist()
    assert sorted(served + copies) == sorted(set(range(len(sweep.cells))) - done)
    assert planned.n_cells == len(served) + len(copies) == sum(planned.kinds.values())
    for other in copies:
        cell = planned.served_by[other]
        assert asked.deduplication
        same = {"number": 0, "row": 0, "entry": 0, "reference": None, "control": None}
        assert replace(sweep.cells[int(cell)], **same) == replace(sweep.cells[other], **same)

    prompts = [prompt for step in steps for one in step.sources for prompt in one.prompts]
    needed = {state for step in steps for cell in step.cells for state in needs(cell)}
    assert set(prompts) == {prompt for prompt, _, _ in needed}
    if asked.source_sharing:
        assert len(prompts) == len(set(prompts))


@settings(max_examples=80)
@given(data=st.data())
def test_a_plan_keeps_its_budget(data, tiny_model):
    """But for a pass of a single cell, or of a single source prompt, which has to run."""
    model = tiny_model("llama")
    sweep = data.draw(sweeps(model))
    max_rows, memory = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 10**6))
    asked = data.draw(optimisations)
    planned = plan(sweep, context="session", max_rows=max_rows, memory=memory, optimisations=asked)
    costs = Costs(info=model.info)
    decodes = sweep.scope.readout.decodes and from_cache(sweep, asked)
    for step in planned.steps():
        for one in step.targets:
            assert len(one.cells) <= (max_rows if asked.row_packing else 1)
            if one.layout:
                assert asked.prefix_sharing or asked.late_entry
                read = len(one.cells) if asked.lean_readout else one.layout.n_tokens
                taken = costs.packed(one.layout.n_tokens, one.layout.prefix, read)
            else:
                width = target_width(planned, step, one)
                read = 1 if asked.lean_readout else width
                taken = costs.batch(len(one.cells), width, read=read, decodes=decodes)
            assert len(one.cells) == 1 or taken <= memory
        for one in step.sources:
            assert len(one.prompts) <= max_rows
            taken = costs.batch(len(one.prompts), source_width(planned, one), read=0, decodes=False)
            assert len(one.prompts) == 1 or taken <= memory


def test_a_budget_is_halved_for_good():
    budget = Budget(max_rows=256, memory=1000)
    assert budget.halved(100) == Budget(max_rows=50, memory=500)
    assert Budget(max_rows=1, memory=1).halved(1) == Budget(max_rows=1, memory=1)


@settings(max_examples=80)
@given(data=st.data())
def test_a_layout_holds_every_token_of_a_cell_once(data, tiny_model):
    """Prefix, trunk up to the branch, and branch are together the cell's prompt."""
    sweep = data.draw(sweeps(tiny_model("llama")))
    planned = plan(sweep, context="session", max_rows=data.draw(st.integers(1, 9)))
    for step in planned.steps():
        for one in step.targets:
            layout = one.layout
            assert layout.offset.tolist() == [sum(layout.count[:place]) for place in range(len(layout.count))]
            assert layout.enters.tolist() == sorted(layout.enters)
            assert layout.prefix in (0, len(step.prefix))
            for place, cell in enumerate(step.cells.take(one.cells)):
                segment = layout.of_cell[place]
                first, last = layout.first[segment], layout.first[segment] + layout.count[segment]
                ids = sweep.target_prompts[cell.target_prompt].ids
                assert ids[: layout.prefix] == step.prefix[: layout.prefix]
                assert layout.prompt[segment] == cell.target_prompt
                if cell.target_layer is None:
                    assert (first, layout.is_branch[segment]) == (layout.prefix, False)
                    continue
                assert layout.is_branch[segment]
                assert (first, last) == (min(cell.target_positions), len(ids))
                assert layout.enters[segment] == cell.target_layer
                assert first >= layout.prefix
                if first > layout.prefix and cell.target_layer < tiny.N_LAYERS - 1:
                    starts_there = layout.offset == layout.trunk_offset[segment]
                    (trunk,) = (starts_there & ~layout.is_branch & (layout.count > 0)).nonzero()[0]
                    assert (layout.prompt[trunk], layout.first[trunk]) == (cell.target_prompt, layout.prefix)
                    assert layout.count[trunk] == layout.trunk_count[segment] >= first - layout.prefix


@settings(max_examples=60)
@given(data=st.data())
def test_states_are_read_or_carried_before_they_are_needed(data, tiny_model):
    sweep = data.draw(sweeps(tiny_model("llama")))
    planned = plan(sweep, context="session", max_rows=data.draw(st.integers(1, 4)))
    held = set()
    for step in planned.steps():
        fresh = named(sweep, step.states)[len(step.carried) :]
        carried, kept, dropped = (named(sweep, part) for part in (step.carried, step.kept, step.dropped))
        assert len(set(fresh)) == len(fresh)
        assert not set(fresh) & held
        for one in step.sources:
            assert {prompt for prompt, _, _ in named(sweep, one.states)} == set(one.prompts)
        assert set(carried) <= held
        assert set(kept) <= set(fresh)
        wanted = {state for cell in step.cells for state in needs(cell)}
        assert wanted <= set(carried) | set(fresh)
        held |= set(kept)
        assert set(dropped) <= held
        held -= set(dropped)
    assert held == set()


def test_many_layers_and_positions_are_one_source_pass(model):
    counts = count(
        plan(sweep_of(model, scope_of(position={"each": "all"}), rows=[{"s": TEXTS[4], "t": "x"}]))
    )
    expected = {
        "steps": 1,
        "source_passes": 1,
        "source_rows": 1,
        "source_tokens": 7,
        "source_blocks": 28,
        "states": 28,
        "target_passes": 1,
        "target_rows": 28,
    }
    assert {name: getattr(counts, name) for name in expected} == expected


def test_a_source_pass_goes_no_deeper_than_is_read(model):
    shallow = sweep_of(model, scope_of(layer=[0, 2], target_layer=0))
    assert count(plan(shallow, context="session")).source_blocks == 3 * 2 * 3
    off = Optimisations(source_sharing=False)
    counts = count(plan(shallow, context="session", optimisations=off))
    assert (counts.source_passes, counts.source_blocks) == (4, 2 * (3 + 2) * 4)


def test_padded_rows_of_one_length_go_together(model):
    rows = [{"s": "x", "t": text} for text in ("x", TEXTS[4], "y", "The city of Paris is in Paris")]
    sweep = sweep_of(model, scope_of(layer=[0, 1]), rows=rows)
    padded = Optimisations(prefix_sharing=False, late_entry=False)
    planned = plan(sweep, max_rows=4, context="session", optimisations=padded)
    widths = [target_width(planned, step, one) for step in planned.steps() for one in step.targets]
    assert widths == [1, 7]
    assert count(planned).target_tokens == 4 * 1 + 4 * 7


def test_packing_runs_fewer_tokens(model):
    """What is shared is run once: 112 cells of one prompt are one clean prompt and 112 last tokens."""
    layers = [0, 1, 2, 3]
    scope = scope_of(layer=layers, target_layer=layers, position={"each": "all"}, readout=NextToken())
    sweep = sweep_of(model, scope, rows=[{"s": TEXTS[4], "t": TEXTS[4]}])
    found = dict(stages(plan(sweep)))
    assert list(found) == ["none", *Optimisations.names()]
    assert found["none"].target_tokens == found["row_packing"].target_tokens == 7 * 7 * 16
    assert (found["none"].target_passes, found["row_packing"].target_passes) == (7 * 16, 1)
    assert (found["source_sharing"].source_passes, found["deduplication"].source_passes) == (1, 28)
    assert found["prefix_sharing"].target_tokens == 6 + 7 * 16
    assert found["prefix_sharing"].target_blocks == 4 * (6 + 7 * 16)
    assert found["late_entry"].target_blocks == 4 * 6 + 7 * 4 * (3 + 2 + 1 + 0)
    assert [counts.flops for counts in found.values()] == sorted(
        (counts.flops for counts in found.values()), reverse=True
    )


def test_prompts_that_begin_alike_run_behind_one_prefix(model):
    """Also where another group of prompts stands among them in the data."""
    beginnings = ("The Eiffel Tower is in the city of Paris", "Diana Diana Diana in the city of Diana")
    queries = (" x -> is", " the city", " is", " Tower ->")
    rows = [{"s": "Paris", "t": f"{one}{query} x"} for query in queries for one in beginnings]
    sweep = sweep_of(model, scope_of(target_layer=[0, 1, 2, 3]), rows=rows)
    planned = plan(sweep, max_rows=16)
    steps = list(planned.steps())
    texts = [tiny.TOKENIZER.decode(step.prefix) for step in steps]
    assert texts == list(beginnings)
    assert [group.entries for group in planned.groups] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    whole = count(plan(sweep, max_rows=16, optimisations=Optimisations(prefix_sharing=False)))
    assert count(planned).target_tokens < whole.target_tokens
    alone = plan(sweep, max_rows=10**6)
    assert [step.prefix for step in alone.steps()] == [()]


@pytest.mark.parametrize(("readout", "n_groups"), [(Generate(max_new_tokens=2), 2), (NextToken(), 1)])
def test_cells_that_decode_behind_a_long_prefix_do_not_copy_it(model, monkeypatch, readout, n_groups):
    """A few cells would be too few for passes of their own, but for the keys and values of their prompts."""
    monkeypatch.setattr(order, "_MANY_COPIED", 16 * 10)
    rows = [{"s": "Paris", "t": f"{name} is in the city of Paris is in the x"} for name in ("Diana", "Tower")]
    planned = plan(sweep_of(model, scope_of(target_layer=[0, 1, 2, 3], readout=readout), rows=rows))
    assert len(planned.groups) == n_groups


def test_a_prefix_runs_once_for_all_the_steps_behind_it(model):
    scope = scope_of(target_layer=[0, 1, 2, 3], readout=NextToken())
    planned = plan(sweep_of(model, scope, rows=[{"s": "Paris", "t": TEXTS[4]}]), max_rows=1)
    counts = count(planned)
    assert (counts.steps, [len(step.prefix) for step in planned.steps()]) == (2, [6, 6])
    assert counts.target_tokens == 6 + 16


def test_equal_cells_of_different_rows_run_once(model):
    rows = [ROW, {"s": "y", "t": "x"}, ROW]
    planned = plan(sweep_of(model, rows=rows))
    assert count(planned).target_rows == 2 * tiny.N_LAYERS
    copies, index = planned.copies(np.arange(2 * tiny.N_LAYERS))
    assert dict(zip(index.tolist(), copies.tolist(), strict=True)) == {
        place: 8 + place for place in range(tiny.N_LAYERS)
    }
    off = plan(sweep_of(model, rows=rows), optimisations=Optimisations(deduplication=False))
    assert off.copies(np.arange(3 * tiny.N_LAYERS))[0].tolist() == []


@contextmanager
def counted(model):
    """What goes through a model's blocks and its embedding, counted by hooks."""
    found = Counter()

    def at_block(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        found["blocks"] += states.shape[:-1].numel()

    def at_embedding(_module, args, _output):
        found["tokens"] += args[0].numel()
        found["forwards"] += 1

    blocks = model.module.get_submodule(model.info.architecture.blocks)
    # nnsight gives a block that is skipped the shell's own output; only what really runs has an attention.
    parts = [block.get_submodule(model.info.architecture.part(ATTENTION).path) for block in blocks]
    hooks = [part.register_forward_hook(at_block) for part in parts]
    hooks.append(model.module.get_input_embeddings().register_forward_hook(at_embedding))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


#: Optimisations that are off together: none, all, those without which rows are whole and padded, and each.
SETS = {
    "none": (),
    "all": Optimisations.names(),
    "segments": ("prefix_sharing", "late_entry"),
    **{name: (name,) for name in Optimisations.names()},
}


COUNTED = {
    "next_token": NextToken(reference="source"),
    "hidden": Hidden(),
    "generate": Generate(max_new_tokens=4),
    "choices": Choices([" the city", " is"]),
}


def counted_cases():
    """All on llama; on gptj each optimisation is off by itself with one of the readouts."""
    for place, readout in enumerate(COUNTED):
        for number, off in enumerate(SETS):
            alone = len(SETS[off]) == 1
            whole = pytest.mark.registry if alone and number % len(COUNTED) != place else ()
            yield pytest.param("llama", readout, off)
            yield pytest.param("gptj", readout, off, marks=whole)


@pytest.mark.parametrize(("family", "readout", "off"), [*counted_cases()])
def test_what_is_predicted_is_what_runs(family, readout, off, tiny_model, monkeypatch):
    """Tokens, and tokens times blocks, of many steps, against hooks on the model's own modules."""
    model, readout = tiny_model(family, copy=1), COUNTED[readout]
    if readout.name == "generate":  # a plan cannot know where a row will end
        monkeypatch.setattr("patchscope_nn.lower.readout.eos_ids", lambda _model: ())
    used = replace(Optimisations(), **dict.fromkeys(SETS[off], False))
    rows = [
        {"s": source, "t": f"The city of{target}"} for source in TEXTS[:2] for target in ("x", " is x", "xx")
    ]
    scope = scope_of(layer=["embed", 2], position={"each": [0, -1]}, target_layer=[0, 2], readout=readout)
    sweep = sweep_of(model, scope, rows=rows, controls=["unpatched", "shuffled"])
    planned = plan(sweep, context="session", max_rows=6, optimisations=used)
    mapping = resolve_mapping("identity", source=model.info, target=model.info)
    backend = Places.of().backend
    with counted(model) as found:
        steps = run_steps(planned, source=model, target=model, mapping=mapping, backend=backend)
        ran = sorted(number for step in steps for result in step for number in result.cells.tolist())
    assert ran == list(range(len(sweep.cells)))
    counts = count(planned)
    assert counts.steps > 2
    assert found["blocks"] == counts.source_blocks + counts.target_blocks + counts.readout_blocks
    assert found["tokens"] == counts.source_tokens + counts.target_tokens + counts.readout_tokens


@pytest.mark.parametrize("off", [None, "all"])
@pytest.mark.parametrize(
    ("target", "readout"),
    [
        ({"window": 2}, Hidden()),
        ({"window": 2, "states": "own", "layer": "same"}, NextToken(reference="source")),
        ({"write": "zero"}, Choices([" the city", " is"])),
        ({"corrupt": {"position": 0, "samples": 2}}, NextToken()),
        ({"every_step": True}, Choices([" the city", " is"])),
        ({}, Generate(max_new_tokens=3, relevancy=True)),
    ],
    ids=["window", "own states", "zero", "corrupt", "every step", "relevancy"],
)
def test_what_is_predicted_of_other_writes_is_what_runs(target, readout, off, tiny_model, monkeypatch):
    model = tiny_model("llama", copy=1)
    monkeypatch.setattr("patchscope_nn.lower.readout.eos_ids", lambda _model: ())
    used = Optimisations.none() if off else Optimisations()
    scope = scope_of(position={"each": [0, -1]}, layer=[0, 1], target_layer=[0, 2], readout=readout)
    scope = Patchscope(
        source=scope.source, target=Target(**dict(scope.target) | target), readout=scope.readout
    )
    rows = [{"s": source, "t": f"The city of{text}"} for source in TEXTS[:2] for text in ("x", " is x")]
    sweep = sweep_of(model, scope, rows=rows, controls=["unpatched"])
    planned = plan(sweep, context="session", max_rows=10, optimisations=used)
    mapping = resolve_mapping("identity", source=model.info, target=model.info)
    with counted(model) as found:
        steps = run_steps(planned, source=model, target=model, mapping=mapping, backend=Places.of().backend)
        assert sum(len(result.cells) for step in steps for result in step) == len(sweep.cells)
    counts = count(planned)
    assert found["blocks"] == counts.source_blocks + counts.target_blocks + counts.readout_blocks
    assert found["tokens"] == counts.source_tokens + counts.target_tokens + counts.readout_tokens


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"corrupt": {"position": 0}}, "target.corrupt applies to whole prompts"),
        ({"write": {"cut": {"position": 0}}}, "target.write: cut applies to whole prompts"),
        ({"every_step": True}, "target.every_step applies to whole prompts"),
    ],
)
def test_a_plan_says_why_rows_are_whole(target, said, model):
    scope = Patchscope(source=Source(prompt="The Tower is"), target=target, readout=Generate())
    assert f"note: {said}, so every cell is a row" in str(plan(sweep_of(model, scope)))


def test_the_digest_is_of_what_will_run(model):
    base = plan(sweep_of(model), max_rows=3)
    assert base.digest == plan(sweep_of(model), max_rows=3).digest
    assert len({base.digest, plan(sweep_of(model), max_rows=2).digest, plan(sweep_of(model)).digest}) == 3
    assert base.digest != plan(sweep_of(model, scope_of(layer=[0, 1])), max_rows=3).digest
    assert base.digest != plan(sweep_of(model), max_rows=3, done=[0]).digest
    off = Optimisations(late_entry=False)
    assert base.digest != plan(sweep_of(model), max_rows=3, optimisations=off).digest


def test_a_plan_can_be_read(model):
    planned = plan(sweep_of(model))
    said = str(planned)
    assert planned.digest in said
    for name in Optimisations.names():
        assert f"+ {name.replace('_', ' ')} " in said
    assert str(plan(sweep_of(model), done=range(planned.n_cells)))


def test_a_plan_says_what_it_cannot_do(model):
    parts = replace(model.info.architecture, packs=False)
    other = replace(model, info=replace(model.info, architecture=parts))
    assert "the blocks of llama cannot be run on segments of a sequence" in str(plan(sweep_of(other)))
    site = sweep_of(model, scope_of(site="mlp"))
    assert "target.site='mlp' is written inside a block" in str(plan(site))


def test_nothing_left_to_do(model):
    sweep = sweep_of(model)
    planned = plan(sweep, done=range(len(sweep.cells)))
    assert (planned.n_cells, list(planned.steps())) == (0, [])
    assert set(count(planned)) == {0}


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
    assert {step.context for step in plan(sweep).steps()} == {context}


def test_many_cells_are_a_session(model):
    sweep = sweep_of(model, rows=[{"s": TEXTS[0], "t": text} for text in TEXTS[:3]])
    assert {step.context for step in plan(sweep).steps()} == {"session"}
    assert {step.context for step in plan(sweep, context="fused").steps()} == {"fused"}


def test_a_site_that_a_forward_has_passed_is_not_fused(model):
    """A block's attention comes before its output, so a read may come too late for another cell's write."""
    sweep = sweep_of(model, scope_of(layer=[0, 1], target_layer=[1, 2], site="attention"), rows=[ROW])
    layers = {(cell.source_layer, cell.target_layer): cell.number for cell in sweep.cells}
    assert {step.context for step in plan(sweep).steps()} == {"session"}
    for done, context in {((1, 1), (1, 2)): "fused", ((0, 2), (1, 1)): "session"}.items():
        left = plan(sweep, done=[layers[pair] for pair in done])
        assert {step.context for step in left.steps()} == {context}


def test_fused_is_refused_where_a_state_comes_too_late(model):
    sweep = sweep_of(model, scope_of(layer=[0, 2], target_layer=[1, 3]))
    with pytest.raises(InputError) as raised:
        plan(sweep, context="fused")
    assert str(raised.value) == (
        "context='fused' runs source and target in one forward, where the state of layer 2 cannot be written "
        "at layer 1, which runs before it. Use context='session' (or 'auto'), or layers with l <= l*."
    )


def test_fused_is_refused_where_the_cells_do_not_fit(model):
    with pytest.raises(InputError) as raised:
        plan(sweep_of(model), context="fused", max_rows=3)
    assert str(raised.value) == (
        "context='fused' runs all cells in one forward, and these do not fit in one. "
        "Use context='session' (or 'auto'), fewer cells, or a larger max_rows and memory."
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
    assert {step.context for step in planned.steps()} == {context}


@pytest.mark.parametrize("budget", [{"max_rows": 0}, {"memory": 0}])
def test_a_budget_is_at_least_one(budget, model):
    with pytest.raises(InputError, match="should both be at least 1"):
        plan(sweep_of(model), **budget)
