"""Cells: what is paired with what, the controls, the keys, and what does not resolve."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscope_nn.errors import DataError, InputError, LayerError, PositionError
from patchscope_nn.models import Model
from patchscope_nn.models.info import Part
from patchscope_nn.plan import plan
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import expand

ROWS = ({"s": "The Tower is", "t": "x is in"}, {"s": "Diana in Paris", "t": "The city of x"})


@pytest.fixture
def model(tiny_model):
    """A model without its weights: cells need none."""
    loaded = tiny_model("llama")
    return Model(info=loaded.info, tokenizer=loaded.tokenizer, traced=None)


def scope_of(*, source=None, target=None, **options):
    return Patchscope(
        source=Source(**{"prompt": "{s}", "layer": "all"} | (source or {})),
        target=Target(**{"prompt": "{t}", "position": "x"} | (target or {})),
        **options,
    )


def places(cells):
    return [
        (cell.row, cell.source_positions, cell.source_layer, cell.target_positions, cell.target_layer)
        for cell in cells
    ]


def sweep_of(scope, model, *, rows=ROWS, **options):
    return expand(scope, rows=rows, source=model, target=model, **options)


def test_same_pairs_layers(model):
    sweep = sweep_of(scope_of(source={"layer": [-1, "embed", 1]}), model)
    assert places(sweep.cells) == [
        (0, (2,), 3, (0,), 3),
        (0, (2,), -1, (0,), -1),
        (0, (2,), 1, (0,), 1),
        (1, (6,), 3, (4,), 3),
        (1, (6,), -1, (4,), -1),
        (1, (6,), 1, (4,), 1),
    ]


#: Patchscopes whose cells differ in every way that a cell can, and their controls.
VARIED = {
    "positions": (
        scope_of(
            source={"position": {"each": [0, -1]}, "layer": [0, "embed", 2]},
            target={"position": {"each": ["x", -1]}, "layer": [1, 3], "scale": [1, 2.5]},
            readout=NextToken(reference="source"),
        ),
        ["unpatched", "random", "shuffled"],
    ),
    "spans": (scope_of(source={"position": [0, -1]}, target={"position": [0, 2]}), ["random", "shuffled"]),
    "noise": (
        scope_of(
            target={"layer": [1, 2], "corrupt": {"position": 0, "samples": 3}, "position": {"each": ["x", 0]}}
        ),
        ["unpatched", "shuffled"],
    ),
    "text": (scope_of(source={"layer": [0, 1]}), ["text-only", "unpatched", "random"]),
    "differences": (scope_of(source={"minus": "Diana is", "layer": [0, 1]}), ["unpatched", "random"]),
    "means": (scope_of(source={"mean": "positions", "position": [0, -1]}), ["unpatched", "random"]),
    "cuts": (
        Patchscope(
            source=Source(prompt="{s}"),
            target=Target(prompt="{t}", position=-1, write={"cut": {"position": 0}}, layer=[1, 2]),
        ),
        ["unpatched", "random"],
    ),
    "windows": (scope_of(target={"window": 2}), ["unpatched"]),
}
VARIED_ROWS = (*ROWS, {"s": "The city is", "t": "x is in Paris"}, ROWS[0])


def arrays_of(block):
    """Every array of a block, by its name."""
    names = [part.name for part in fields(block) if part.name != "cells"]
    return {name: getattr(block, name) for name in [*names, "row", "target_prompt", "stateful"]}


@pytest.mark.parametrize("name", VARIED)
@given(data=st.data())
def test_a_cell_is_the_same_in_every_block(name, data, tiny_model):
    scope, controls = VARIED[name]
    sweep = sweep_of(scope, tiny_model("llama"), rows=VARIED_ROWS, controls=controls)
    count = len(sweep.cells)
    whole = sweep.cells.block(np.arange(count))
    cells = list(whole)
    numbers = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=12)), np.int64)
    block = sweep.cells.block(numbers)
    assert len(block) == len(numbers)
    assert list(block) == list(whole.take(numbers)) == [cells[number] for number in numbers]
    for part, array in arrays_of(block).items():
        expected = arrays_of(whole)[part][numbers]
        assert array.dtype == expected.dtype, part
        assert array.tolist() == expected.tolist(), part
    writes, of_whole = sweep.writes(block), sweep.writes(whole)
    rows = zip(*(part.tolist() for part in writes), strict=True)
    expected = {
        cell: [row[1:] for row in zip(*(part.tolist() for part in of_whole), strict=True) if row[0] == cell]
        for cell in set(numbers.tolist())
    }
    found = {}
    for place, *row in rows:
        found.setdefault(place, []).append(tuple(row))
    for place, number in enumerate(numbers.tolist()):
        assert found.get(place, []) == expected[number]
    needed = [sweep.reads_of(sweep.cells.block(np.array([number]))) for number in set(numbers.tolist())]
    expected_reads = np.unique(np.concatenate([np.empty(0, np.int64), *needed]))
    assert sweep.reads_of(block).tolist() == expected_reads.tolist()


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("name", VARIED)
def test_all_cells_are_the_same_in_blocks_of_every_size(name, size, model, monkeypatch):
    scope, controls = VARIED[name]
    sweep = sweep_of(scope, model, rows=VARIED_ROWS, controls=controls)
    expected, planned = list(sweep.cells), plan(sweep)
    assert [cell.number for cell in expected] == list(range(len(sweep.cells)))
    assert expected == [sweep.cells[number] for number in range(len(sweep.cells))]
    assert tuple(expected[2:9]) == sweep.cells[2:9]
    assert expected[-1] == sweep.cells[-1]
    monkeypatch.setattr("patchscope_nn.sweep.cells.BLOCK", size)
    blocks = list(sweep.cells.blocks())
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert [cell for block in blocks for cell in block] == expected == list(sweep.cells)
    again = plan(sweep)
    assert again.digest == planned.digest
    assert again.served_by.tolist() == planned.served_by.tolist()


def test_the_order_of_cells(model):
    """As nested loops: i, i*, l, l*, scale, and then the real cell and its controls."""
    scope, controls = VARIED["positions"]
    found = [
        (cell.source_positions, cell.target_positions, cell.source_layer, cell.target_layer, cell.scale)
        for cell in sweep_of(scope, model, controls=controls).cells
        if cell.row == 0 and cell.control == "random"
    ]
    assert found == [
        (read, written, layer, target, scale)
        for read in ((0,), (2,))
        for written in ((0,), (2,))
        for layer in (0, -1, 2)
        for target in (1, 3)
        for scale in (1, 2.5)
    ]
    kinds = [cell.control for cell in sweep_of(scope, model, controls=controls).cells if cell.row == 0]
    # There is an unpatched cell for each i* and each i whose distribution is compared.
    assert kinds == ["unpatched"] * 4 + [None, "random", "shuffled"] * len(found)


def test_other_layers_are_crossed(model):
    sweep = sweep_of(
        scope_of(source={"layer": [0, 2]}, target={"layer": ["embed", -1]}), model, rows=ROWS[:1]
    )
    assert [(cell.source_layer, cell.target_layer) for cell in sweep.cells] == [
        (0, -1),
        (0, 3),
        (2, -1),
        (2, 3),
    ]


def test_each_position_is_a_cell_and_a_span_is_one(model):
    scope = scope_of(
        source={"position": {"each": [0, -1]}, "layer": 1},
        target={"position": {"each": ["x", -1]}, "layer": 2},
    )
    assert places(sweep_of(scope, model, rows=ROWS[:1]).cells) == [
        (0, (0,), 1, (0,), 2),
        (0, (0,), 1, (2,), 2),
        (0, (2,), 1, (0,), 2),
        (0, (2,), 1, (2,), 2),
    ]
    scope = scope_of(
        source={"position": {"start": 1}, "layer": 1}, target={"position": ["x", -1], "layer": 2}
    )
    assert places(sweep_of(scope, model, rows=ROWS[:1]).cells) == [(0, (1, 2), 1, (0, 2), 2)]


def test_without_a_target_prompt_the_source_is_patched_in_its_own_place(model):
    scope = Patchscope(
        source=Source(prompt="{s}", position={"each": [0, -1]}, layer=1), target=Target(layer=3)
    )
    sweep = sweep_of(scope, model, rows=ROWS[:1])
    assert places(sweep.cells) == [(0, (0,), 1, (0,), 3), (0, (2,), 1, (2,), 3)]
    assert sweep.target_prompts == sweep.source_prompts


def test_without_a_target_position_the_last_token_is_patched(model):
    scope = Patchscope(source=Source(prompt="{s}", layer=1), target=Target(prompt="{t}"))
    assert [cell.target_positions for cell in sweep_of(scope, model).cells] == [(2,), (4,)]


def test_prompts_are_filled_and_kept_once(model):
    rows = [*ROWS, ROWS[0], {"s": "The Tower is", "t": "x {{is}}"}]
    sweep = sweep_of(scope_of(), model, rows=rows)
    assert [one.text for one in sweep.source_prompts] == ["The Tower is", "Diana in Paris"]
    assert [one.text for one in sweep.target_prompts] == ["x is in", "The city of x", "x {{is}}"]
    for one in sweep.source_prompts:
        assert list(one.ids) == tiny.TOKENIZER(one.text)["input_ids"]
    assert [cell.row for cell in sweep.cells] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.quick
def test_controls_are_counted_as_promised(model):
    sweep = sweep_of(scope_of(), model, controls=["unpatched", "random", "shuffled"])
    assert Counter((cell.row, cell.control) for cell in sweep.cells) == {
        (row, control): 1 if control == "unpatched" else 4
        for row in (0, 1)
        for control in ("unpatched", None, "random", "shuffled")
    }
    for cell in sweep.cells:
        own = cell.control != "shuffled"
        if cell.control == "unpatched":
            assert (cell.source, cell.source_layer, cell.target_layer) == (None, None, None)
        else:
            assert cell.source == (cell.row if own else 1 - cell.row)
        assert cell.target_prompt == cell.row


def test_unpatched_is_compared_with_every_source_position_where_the_source_is_the_reference(model):
    source = {"position": {"each": [0, 1]}, "layer": 1}
    plain = sweep_of(scope_of(source=source), model, rows=ROWS[:1], controls=["unpatched"])
    assert [cell.control for cell in plain.cells] == ["unpatched", None, None]
    assert {cell.reference for cell in plain.cells} == {None}
    scope = scope_of(source=source, readout=NextToken(reference="source"))
    sweep = sweep_of(scope, model, rows=ROWS[:1], controls=["unpatched"])
    assert [(cell.control, cell.reference) for cell in sweep.cells] == [
        ("unpatched", (0, 0)),
        ("unpatched", (0, 1)),
        (None, (0, 0)),
        (None, (0, 1)),
    ]


def test_a_shuffled_state_is_compared_with_the_row_it_is_shown_to(model):
    scope = scope_of(source={"layer": 1}, readout=NextToken(reference="source"))
    sweep = sweep_of(scope, model, controls=["shuffled"])
    shuffled = [cell for cell in sweep.cells if cell.control == "shuffled"]
    assert [(cell.source, cell.source_positions, cell.reference) for cell in shuffled] == [
        (1, (6,), (0, 2)),
        (0, (2,), (1, 6)),
    ]


def test_rows_of_one_source_prompt_are_no_stand_ins(model):
    rows = [{"s": "Diana", "t": "x"}, {"s": "Diana", "t": "x is"}, {"s": "Paris", "t": "x"}]
    sweep = sweep_of(scope_of(source={"layer": 0}), model, rows=rows, controls=["shuffled"])
    assert [cell.source for cell in sweep.cells if cell.control == "shuffled"][:2] == [1, 1]
    with pytest.raises(
        DataError, match=r"controls: shuffled gives data row 0 the state of another row .* Give more rows"
    ):
        sweep_of(scope_of(), model, rows=rows[:2], controls=["shuffled"])


@settings(max_examples=30)
@given(data=st.data())
def test_a_cell_is_the_same_however_it_is_asked_for(data, tiny_model):
    """Cells are made when they are asked for: all in turn, by number, by row, again."""
    texts = st.sampled_from(["The Tower is", "Diana", " Paris", "x", "The city of Paris is in"])
    rows = data.draw(st.lists(st.fixed_dictionaries({"s": texts, "t": texts}), min_size=1, max_size=4))
    controls = data.draw(st.sets(st.sampled_from(["unpatched", "random"])))
    if len({row["s"] for row in rows}) > 1:
        controls |= data.draw(st.sets(st.just("shuffled")))
    scope = scope_of(
        source={"position": {"each": "all"}, "layer": data.draw(st.sampled_from(["all", [0, -1]]))},
        target={"position": data.draw(st.sampled_from([-1, {"each": [0, -1]}])), "layer": [0, -1]},
        readout=data.draw(st.sampled_from([Hidden(), NextToken(reference=["x"]), Generate()])),
    )
    sweep = sweep_of(scope, tiny_model("llama"), rows=rows, controls=sorted(controls))
    cells = list(sweep.cells)
    assert [cell.number for cell in cells] == list(range(len(sweep.cells)))
    assert [sweep.cells[number] for number in range(len(cells))] == cells
    assert (sweep.cells[-1], sweep.cells[1:3]) == (cells[-1], tuple(cells[1:3]))
    read = {(cell.source, cell.source_positions) for cell in cells if cell.source_layer is not None}
    origins = {tuple(origin) for origin in sweep.cells.origins}
    assert read <= origins
    again = sweep_of(scope, tiny_model("llama"), rows=rows, controls=sorted(controls))
    assert list(again.cells) == cells
    with pytest.raises(IndexError):
        sweep.cells[len(cells)]


def test_seeds_tell_what_a_cell_is(model):
    base = {cell.seed for cell in sweep_of(scope_of(), model).cells}
    with_random = sweep_of(scope_of(), model, controls=["random"]).cells
    assert base == {cell.seed for cell in with_random if not cell.control}
    assert len({cell.seed for cell in with_random}) == len(with_random)
    others = [
        scope_of(source={"position": 0}),
        scope_of(source={"site": "mlp"}),
        scope_of(target={"site": "mlp"}),
        scope_of(target={"position": -1, "prompt": "{s} x"}),
        scope_of(mapping="target_norm"),
        scope_of(readout=NextToken(top_k=6)),
    ]
    for other in others:
        assert base.isdisjoint(cell.seed for cell in sweep_of(other, model).cells)
    assert base.isdisjoint(cell.seed for cell in sweep_of(scope_of(), model, seed=1).cells)


def test_unpatched_runs_of_one_prompt_are_the_same_run(model):
    """Unless they are compared with their own sources."""
    rows = [{"s": text, "t": "x"} for text in ("The Tower is", "Diana")]
    plain = sweep_of(scope_of(source={"layer": 1}), model, rows=rows, controls=["unpatched"]).cells
    assert plain[0].seed == plain[2].seed
    scope = scope_of(source={"layer": 1}, readout=NextToken(reference="source"))
    compared = sweep_of(scope, model, rows=rows, controls=["unpatched"]).cells
    assert compared[0].seed != compared[2].seed


def test_equal_cells_of_different_rows_start_from_the_same_number(model):
    cells = sweep_of(scope_of(source={"layer": [0, 1]}), model, rows=[ROWS[0], ROWS[1], ROWS[0]]).cells
    assert cells[0].seed == cells[4].seed != cells[2].seed
    assert cells[0].number != cells[4].number
    assert cells[0].seed != cells[1].seed


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        pytest.param(
            {"source": {"position": [0, 1]}},
            PositionError,
            "source.position names 2 tokens and target.position 1; several tokens are patched one to one. "
            "Name as many tokens on both sides, or one source token for all.",
            id="unequal lengths",
        ),
        pytest.param(
            {"readout": NextToken(position=-4)},
            PositionError,
            "readout.next_token.position=-4 is outside the 3-token target prompt. Use -1 for its last token.",
            id="readout outside",
        ),
        pytest.param(
            {"target": {"position": 1}, "readout": NextToken(position=0)},
            PositionError,
            "readout.next_token.position=0 is before the patched position 1, where the patch has no effect. "
            "Read at the patched token or after it; -1 is the last.",
            id="readout before the patch",
        ),
        pytest.param(
            {"source": {"layer": 4}},
            LayerError,
            "source.layer=4 is outside this model, whose 4 blocks are 0..3 (or -4..-1 from the end). "
            "Use 'embed' for the input of block 0.",
            id="source layer",
        ),
        pytest.param(
            {"target": {"layer": 9}},
            LayerError,
            "target.layer=9 is outside this model, whose 4 blocks are 0..3 (or -4..-1 from the end). "
            "Use 'embed' for the input of block 0.",
            id="target layer",
        ),
        pytest.param(
            {"source": {"site": "mlp", "layer": ["embed", 0]}},
            InputError,
            "source.layer='embed' is the input of block 0, which has no mlp. "
            "Leave 'embed' out, or use source.site: residual.",
            id="embed of a part",
        ),
        pytest.param(
            {"source": {"layer": ["embed", 0]}, "target": {"site": "attention"}},
            InputError,
            "target.layer='same' writes at 'embed', the input of block 0, which has no attention. "
            "Leave 'embed' out of source.layer, or use target.site: residual.",
            id="same as embed, of a part",
        ),
        pytest.param(
            {"source": {"prompt": "{what}"}},
            DataError,
            "source.prompt asks for the column 'what', which the data does not have. "
            "Allowed: s, t. Write {{ and }} for braces that are text.",
            id="missing column",
        ),
        pytest.param(
            {"readout": NextToken(reference=["{u}"])},
            DataError,
            "readout.next_token asks for the column 'u', which the data does not have. "
            "Allowed: s, t. Write {{ and }} for braces that are text.",
            id="missing column of a reference",
        ),
        pytest.param(
            {"source": {"prompt": "x" * 65}},
            InputError,
            "source.prompt has 65 tokens; LlamaForCausalLM reads at most 64. Shorten the prompt.",
            id="source too long",
        ),
        pytest.param(
            {"target": {"prompt": "x" * 60}, "readout": Generate(max_new_tokens=5)},
            InputError,
            "target.prompt has 60 tokens and 5 more to generate; LlamaForCausalLM reads at most 64. "
            "Shorten the prompt.",
            id="target too long to generate",
        ),
        pytest.param(
            {"target": {"prompt": "x" * 62}, "readout": Choices(["Diana", " Paris"])},
            InputError,
            "target.prompt has 62 tokens and 5 more of readout.choices; LlamaForCausalLM reads at most 64. "
            "Shorten the prompt.",
            id="target too long for a choice",
        ),
    ],
)
def test_what_does_not_resolve(options, kind, message, model):
    with pytest.raises(InputError) as raised:
        sweep_of(scope_of(**options), model, rows=ROWS[:1])
    assert str(raised.value) == message
    assert type(raised.value) is kind


def test_errors_name_the_row_where_there_are_several(model):
    with pytest.raises(PositionError, match=r"^data row 1: target\.position='x' does not occur in"):
        sweep_of(scope_of(), model, rows=[ROWS[0], {"s": "Diana", "t": "Paris"}])


def test_no_rows(model):
    with pytest.raises(DataError, match="the data has no rows"):
        sweep_of(scope_of(), model, rows=[])


def test_same_needs_a_target_as_deep(model):
    shallow = replace(model, info=replace(model.info, n_layers=2, name="shallow"))
    with pytest.raises(
        LayerError, match=r"^target\.layer: same pairs layer 2 of the source .* 0\.\.1\. Narrow"
    ):
        expand(scope_of(), rows=ROWS, source=model, target=shallow)


def test_blocks_without_the_site(model):
    parts = replace(model.info.architecture, parts=(Part("self_attn", 32, 32), Part("experts.0", 32, 32)))
    other = replace(model, info=replace(model.info, architecture=parts))
    message = (
        r"^target\.site='mlp': the blocks of LlamaForCausalLM \(llama\) have none of the modules mlp, "
        r"feed_forward, ffn, block_sparse_moe, fc2\. They have self_attn\. Use site: residual\."
    )
    with pytest.raises(InputError, match=message):
        expand(scope_of(target={"site": "mlp"}), rows=ROWS, source=model, target=other)


def test_the_source_is_no_reference_across_vocabularies(model):
    other = replace(model, tokenizer=tiny.make_tokenizer())
    other.tokenizer.add_tokens(["another"])
    with pytest.raises(
        InputError, match=r"reference: source compares .* number them differently\. Name the ref"
    ):
        expand(scope_of(readout=NextToken(reference="source")), rows=ROWS, source=model, target=other)
    named = expand(scope_of(readout=NextToken(reference=["x"])), rows=ROWS, source=model, target=other)
    assert {cell.reference for cell in named.cells} == {None}
    same = replace(model, tokenizer=tiny.make_tokenizer())
    equal = expand(scope_of(readout=NextToken(reference="source")), rows=ROWS, source=model, target=same)
    assert None not in {cell.reference for cell in equal.cells}


def test_named_references_and_choices_stand_after_the_prompt(model):
    rows = [{"s": "Diana", "t": "x is", "a": " Paris"}]
    sweep = sweep_of(scope_of(readout=NextToken(reference=["{a}", "the"])), model, rows=rows)
    ids = [tiny.TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (" Paris", "the")]
    assert sweep.entries[0].reference_ids == (ids[0][0], ids[1][0])
    sweep = sweep_of(scope_of(readout=Choices(["{a}", "the"])), model, rows=rows)
    assert sweep.entries[0].choices == (" Paris", "the")
    assert [list(one) for one in sweep.entries[0].continuations] == ids


def test_an_ensemble_has_cells_for_each_prompt(model):
    scope = scope_of(
        source={"layer": 1}, target={"prompt": None, "prompts": ["x of {t}", "the city x"], "position": "x"}
    )
    sweep = sweep_of(scope, model, controls=["unpatched", "random"])
    said = [
        (cell.row, cell.control, sweep.target_prompts[cell.target_prompt].text, cell.target_layer)
        for cell in sweep.cells
    ]
    assert said == [
        (row, control, text, None if control == "unpatched" else 1)
        for row in (0, 1)
        for text in (f"x of {ROWS[row]['t']}", "the city x")
        for control in ("unpatched", None, "random")
    ]
    assert [entry.row for entry in sweep.entries] == [0, 0, 1, 1]
    assert len({cell.seed for cell in sweep.cells}) == 11  # the same T as it is, of both rows


def test_a_target_prompt_may_say_the_layer(model):
    scope = scope_of(
        source={"layer": ["embed", 1, -1]}, target={"prompt": "Layer {source_layer}: x", "layer": [0, 2]}
    )
    sweep = sweep_of(scope, model, rows=ROWS[:1])
    assert [
        (cell.source_layer, sweep.target_prompts[cell.target_prompt].text, cell.target_layer)
        for cell in sweep.cells
    ] == [(layer, f"Layer {layer}: x", target) for layer in (-1, 1, 3) for target in (0, 2)]
    scope = scope_of(
        source={"layer": [0, 2], "site": "before"}, target={"prompt": "{source_layer} x", "layer": "same"}
    )
    sweep = sweep_of(scope, model, rows=ROWS[:1])
    assert [one.text for one in sweep.target_prompts] == ["0 x", "2 x"]


@pytest.mark.parametrize("write", ["zero", {"noise": 1.0}, {"cut": {"position": 0}}])
@pytest.mark.parametrize("site", ["residual", "before"])
@pytest.mark.parametrize(
    ("layers", "expected"), [({"target": [0, 2]}, [0, 2]), ({"source": [1, 3], "target": "same"}, [1, 3])]
)
def test_a_prompt_says_the_layer_that_is_written_without_a_state(layers, expected, site, write, model):
    """l is l*: in the table, and in the prompt; source.layer is another way to give it."""
    if site == "before" and "cut" in write:
        pytest.skip("a cut has no site")
    scope = scope_of(
        source={"layer": layers.get("source", [1, 2])},
        target={"prompt": "{source_layer} x", "layer": layers["target"], "write": write, "site": site},
    )
    sweep = sweep_of(scope, model, rows=ROWS[:1])
    assert [
        (
            cell.source_layer + sweep.shifts[0],
            cell.target_layer + sweep.shifts[1],
            sweep.target_prompts[cell.target_prompt].text,
        )
        for cell in sweep.cells
    ] == [(layer, layer, f"{layer} x") for layer in expected]


def test_scales_and_samples_are_crossed_with_layers(model):
    scope = scope_of(
        source={"layer": [0, 1]},
        target={"layer": 2, "scale": [1, 2.5], "corrupt": {"position": 0, "samples": 2}},
    )
    cells = sweep_of(scope, model, rows=ROWS[:1], controls=["unpatched", "random"]).cells
    assert [(cell.control, cell.source_layer, cell.scale, cell.sample) for cell in cells] == [
        *(("unpatched", None, 1.0, sample) for sample in (0, 1)),
        *(
            (control, layer, scale, sample)
            for layer in (0, 1)
            for scale in (1.0, 2.5)
            for sample in (0, 1)
            for control in (None, "random")
        ),
    ]
    assert len({cell.seed for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("source", "target", "texts"),
    [
        pytest.param({}, {}, ["The Tower is is in", "The city of Diana in Paris"], id="the whole source"),
        pytest.param(
            {"position": 1}, {}, ["The Tower is in", "The city of Di"], id="the source up to its position"
        ),
        pytest.param(
            {"position": "first:i"}, {"prompt": "of x in x", "position": {"every": "x"}}, None, id="k"
        ),
        pytest.param({}, {"prompt": "of the city", "position": " the"}, None, id="a space stays"),
    ],
)
def test_text_only_puts_the_text_in_the_place_of_the_state(source, target, texts, model):
    if texts is None:
        scope = scope_of(source={"layer": [0, 2], "prompt": "Diana"}, target={"layer": [1, 2]} | target)
        wanted = {"of x in x": "of Diana", "of the city": "of Diana city"}[scope.target.prompt]
        texts = [wanted, wanted]
    else:
        scope = scope_of(source={"layer": [0, 2]} | source, target={"layer": [1, 2]} | target)
    sweep = sweep_of(scope, model, controls=["text-only", "random"])
    bare = [cell for cell in sweep.cells if cell.control == "text-only"]
    assert [sweep.target_prompts[cell.target_prompt].text for cell in bare] == texts
    for cell in bare:
        assert (cell.source, cell.source_layer, cell.target_layer, cell.terms) == (None,) * 3 + ((),)
    assert [cell.control for cell in sweep.cells] == ([None, "random"] * 4 + ["text-only"]) * 2


def test_text_only_of_a_chat_and_of_the_source_itself(model):
    chat = [("user", "What is x?")]
    scope = scope_of(source={"prompt": "Diana", "layer": 0}, target={"prompt": chat, "layer": 0})
    sweep = sweep_of(scope, model, rows=[{}], controls=["text-only"])
    assert "What is Diana?" in sweep.target_prompts[sweep.cells[-1].target_prompt].text
    own = Patchscope(source=Source(prompt="The Tower is", position={"each": [0, 1]}, layer=0))
    sweep = sweep_of(own, model, rows=[{}], controls=["text-only"])
    bare = [cell for cell in sweep.cells if cell.control == "text-only"]
    assert [sweep.target_prompts[cell.target_prompt].text for cell in bare] == ["The Tower is"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"source": {"prompt": None, "vector": "file"}},
            "controls: text-only replaces the source's state by its text, and this source does not have a "
            "single text. Leave text-only out if the source is a vector or the mean of rows.",
            id="a vector",
        ),
        pytest.param(
            {"source": {"mean": "rows"}, "target": {"prompt": "x"}},
            "controls: text-only replaces the source's state by its text, and this source does not have a "
            "single text. Leave text-only out if the source is a vector or the mean of rows.",
            id="the mean of rows",
        ),
        pytest.param(
            {"readout": NextToken(position=2)},
            "controls: text-only changes the length of the target prompt, and then readout.next_token."
            "position=2 is a different token. Count it from the end: -1 is the last token.",
            id="read at a place from the left",
        ),
    ],
)
def test_text_only_needs_a_text(options, message, model):
    with pytest.raises(InputError) as raised:
        sweep_of(scope_of(**options), model, controls=["text-only"])
    assert str(raised.value) == message


def test_random_cuts_other_tokens(model):
    scope = scope_of(
        target={
            "prompt": "The city of Paris is x",
            "position": "x",
            "layer": [0, 1],
            "write": {"cut": {"position": [0, "city"]}},
        },
        readout=NextToken(),
    )
    cells = sweep_of(scope, model, rows=ROWS[:1], controls=["unpatched", "random"]).cells
    assert [(cell.control, cell.target_layer) for cell in cells] == [
        ("unpatched", None),
        *((control, layer) for layer in (0, 1) for control in (None, "random")),
    ]
    last = cells[1].target_positions[0]
    assert [cell.unseen for cell in cells if cell.control is None] == [(0, 1)] * 2
    for cell in cells:
        if cell.control == "random":
            assert len(cell.unseen) == 2
            assert set(cell.unseen) <= set(range(2, last))
    assert cells[0].unseen == ()


def test_what_writes_no_state_is_where_it_writes(model):
    """l is then l*, and there is no source to speak of."""
    scope = scope_of(source={"layer": "all"}, target={"layer": [1, 3], "write": "zero"})
    sweep = sweep_of(scope, model, rows=ROWS[:1])
    assert [(cell.source, cell.source_layer, cell.target_layer) for cell in sweep.cells] == [
        (None, 1, 1),
        (None, 3, 3),
    ]


def test_a_mean_is_shown_another_of_any_length(model):
    scope = scope_of(source={"position": {"start": 0}, "mean": "positions", "layer": 0})
    sweep = sweep_of(scope, model, controls=["shuffled"])
    assert [cell.source for cell in sweep.cells] == [0, 1, 1, 0]
    assert [len(cell.source_positions) for cell in sweep.cells] == [3, 7, 7, 3]


def test_a_vector_is_the_same_run_for_every_layer(model):
    """Unless l* is l."""
    source = {"prompt": None, "vector": "file", "layer": [0, 1, 2]}
    for layer, runs in ((3, 1), ("same", 3)):
        scope = scope_of(source=source, target={"layer": layer})
        cells = sweep_of(scope, model, rows=ROWS[:1], controls=["random"]).cells
        assert [cell.source_layer for cell in cells] == [0, 0, 1, 1, 2, 2]
        assert len({cell.seed for cell in cells}) == 2 * runs


def test_text_only_is_read_inside_its_prompt(model):
    scope = scope_of(
        source={"prompt": "The"},
        target={"prompt": "x is in", "position": {"start": 0}},
        readout=NextToken(position=-1),
    )
    assert sweep_of(scope, model, controls=["text-only"])
    far = scope_of(
        source={"prompt": "The"},
        target={"prompt": "Diana x", "position": {"tokens": "Diana"}},
        readout=NextToken(position=-7),
    )
    with pytest.raises(PositionError, match=r"position=-7 is outside the 3-token target prompt"):
        sweep_of(far, model, controls=["text-only"])


def test_groups_that_begin_alike_are_shown_each_other(model):
    """What is averaged is another, where any row of it is."""
    rows = [
        {"s": text, "k": kind, "t": "x"}
        for text, kind in (("Diana", "a"), ("Paris", "a"), ("Diana", "b"), ("The", "b"))
    ]
    scope = scope_of(source={"mean": {"rows": "k"}, "layer": 0})
    sweep = sweep_of(scope, model, rows=rows, controls=["shuffled"])
    read = [[term[0] for term in cell.terms] for cell in sweep.cells]
    assert read == [[0, 1], [0, 2], [0, 2], [0, 1]]
