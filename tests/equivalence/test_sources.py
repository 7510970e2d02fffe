"""States that are made of several, or come from a file: means, differences and vectors, against hooks."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch
from by_hand import Hand, ids_of, same_in_every_way
from safetensors.torch import save_file

import patchscope_nn as ps
from patchscope_nn.errors import DataError, InputError, PositionError, SpecError
from patchscope_nn.models import load
from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import expand

ROWS = (
    {"s": "The Eiffel Tower", "b": "The", "t": "Diana is in x ->", "kind": "place"},
    {"s": "Diana", "b": "x is", "t": "The city of x", "kind": "person"},
    {"s": "in the city of Paris", "b": "x", "t": "The city of x", "kind": "place"},
)
FAMILIES = ("llama", "gpt2", "gemma3", "opt")
READOUTS = {
    "next_token": NextToken(top_k=3),
    "generate": Generate(max_new_tokens=3),
    "hidden": Hidden(),
}
VECTORS = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file with one vector, and one with a vector and a matrix."""
    folder = tmp_path_factory.mktemp("vectors")
    save_file({"direction": VECTORS[0].clone()}, folder / "one.safetensors")
    save_file({"rows": VECTORS, "one": VECTORS[1].clone()}, folder / "more.safetensors")
    return folder


def scope_of(readout, source, *, target=None, **options):
    return Patchscope(
        source=Source(**{"layer": [0, 2], "prompt": "{s}"} | source),
        target=Target(**{"prompt": "{t}", "position": "x", "layer": [1, 3]} | (target or {})),
        readout=READOUTS[readout],
        **options,
    )


def made(hand, row, cell, *, mean, minus):
    """The state of a row by its definition."""
    count = len(ids_of(row["s"]))
    places = range(count) if mean else [count - 1]
    state = hand.state(ids_of(row["s"]), cell.source_layer, places).mean(0, keepdim=True)
    if minus:
        other = ids_of(row["b"])
        places = range(len(other)) if mean else [len(other) - 1]
        state = state - hand.state(other, cell.source_layer, places).mean(0, keepdim=True)
    return state


def check(found, scope, hand, rows, state_of, *, f=lambda state: state, mode="replace"):
    """`state_of(cell, row)` is the state that a cell is to write, before it is mapped."""
    for cell, given in found:
        row, writes = rows[cell.row], []
        ids = ids_of(row["t"])
        if cell.target_layer is not None:
            state = f(state_of(cell, row))
            new = {
                "replace": lambda clean, state=state: state.expand_as(clean),
                "add": lambda clean, state=state: clean + state,
            }[mode]
            writes.append((cell.target_layer, cell.target_positions, new))

        def changes(_count, writes=writes):
            return [hand.write(*write) for write in writes]

        if scope.readout.name != "hidden":
            expected = hand.read(scope.readout, ids, changes)
        elif writes:
            expected = {"hidden": new(hand.state(ids, *writes[0][:2])).tolist()}
        else:
            expected = {"hidden": None}
        hooks.assert_same(given, expected)


@pytest.mark.parametrize("mean", [False, True], ids=["last", "mean"])
@pytest.mark.parametrize("minus", [False, True], ids=["plain", "minus"])
@pytest.mark.parametrize(
    ("family", "readout"),
    [("llama", "next_token"), ("gpt2", "generate"), ("gemma3", "hidden"), ("opt", "next_token")],
)
def test_means_and_differences(family, readout, minus, mean, *, tiny_model, run_cells):
    source = {"position": {"start": 0}, "mean": "positions"} if mean else {}
    scope = scope_of(readout, source | ({"minus": "{b}"} if minus else {}), target={"write": "add"})
    options = {"rows": ROWS, "controls": ["unpatched"], "context": "session", "rehearsed": family == "llama"}
    found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
    hand = Hand(family)
    check(
        found, scope, hand, ROWS, lambda cell, row: made(hand, row, cell, mean=mean, minus=minus), mode="add"
    )


def test_states_are_carried_to_the_steps_that_add_them_up(tiny_model, run_cells):
    scope = scope_of("next_token", {"position": {"start": 0}, "mean": "positions", "minus": "{b}"})
    hand = Hand("llama")
    for options in ({}, {"remote": "local"}):
        found = run_cells(scope, tiny_model(), rows=ROWS, max_rows=1, controls=["shuffled"], **options)
        real = [one for one in found if one[0].control is None]
        check(real, scope, hand, ROWS, lambda cell, row: made(hand, row, cell, mean=True, minus=True))


@pytest.mark.parametrize("context", ["nested", "bridged"])
@pytest.mark.parametrize("remote", [False, "local"])
def test_two_models_and_a_mapping_of_what_is_added_up(context, remote, tiny_model, run_cells):
    """f is of the sum, wherever it is computed: a mapping that is not linear tells."""
    if (context, remote) == ("nested", "local"):
        pytest.skip("two models behind a backend are always bridged")
    read, written = Hand("llama"), Hand("gpt2")
    for source in ({"minus": "{b}"}, {"position": {"start": 0}, "mean": "positions"}):
        scope = scope_of("next_token", source, mapping=torch.tanh)
        found = run_cells(scope, tiny_model(), tiny_model("gpt2"), rows=ROWS, context=context, remote=remote)
        wanted = {"mean": "mean" in source, "minus": "minus" in source}

        def state(cell, row, wanted=wanted):
            return made(read, row, cell, **wanted)

        check(found, scope, written, ROWS, state, f=torch.tanh)


@pytest.mark.parametrize(
    ("family", "readout"), [("llama", "next_token"), ("gpt2", "generate"), ("opt", "hidden")]
)
@pytest.mark.parametrize("mean", ["rows", {"rows": "kind"}], ids=["all", "by kind"])
@pytest.mark.parametrize("minus", [False, True], ids=["plain", "minus"])
def test_the_mean_of_rows(minus, mean, family, readout, *, tiny_model, run_cells):
    source = {"mean": mean} | ({"minus": "{b}"} if minus else {})
    scope = scope_of(readout, source, target={"prompt": "Diana is in x ->"})
    hand, groups = Hand(family), [ROWS] if mean == "rows" else [(ROWS[0], ROWS[2]), (ROWS[1],)]
    options = {"rows": ROWS, "controls": ["unpatched"], "context": "session", "rehearsed": family == "llama"}
    found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
    assert {cell.row for cell, _ in found} == set(range(len(groups)))

    def state(cell, _row):
        states = [made(hand, row, cell, mean=False, minus=minus) for row in groups[cell.row]]
        return torch.stack(states).mean(0)

    check(found, scope, hand, [{"t": "Diana is in x ->"}] * 2, state)


def test_rows_that_are_averaged_keep_what_they_share(tiny_model):
    model, rows = tiny_model(), [row | {"answer": "x"} for row in ROWS]
    scope = scope_of("generate", {"mean": {"rows": "kind"}}, target={"prompt": "{kind} x"})
    sweep = expand(scope, rows=rows, source=model, target=model)
    assert list(sweep.rows) == [{"kind": "place", "answer": "x"}, {**rows[1]}]
    assert [prompt.text for prompt in sweep.target_prompts] == ["place x", "person x"]
    table = ps.run(scope, model=model, data=rows, metrics=[{"contains": {"reference": "answer"}}]).table()
    assert table["row"].tolist() == [0] * 4 + [1] * 4
    assert set(table["contains"]) <= {0.0, 1.0}
    with pytest.raises(DataError, match=r"metrics\.contains\.reference='s' is not a column of data row 0"):
        ps.run(scope, model=model, data=rows, metrics=[{"contains": {"reference": "s"}}])


@pytest.mark.parametrize(
    ("target", "readout"),
    [
        ({"prompt": "{t}"}, NextToken()),
        ({"prompt": "The Diana x", "position": "{x}"}, NextToken()),
        ({"prompt": "x"}, NextToken(reference=["{x}"])),
        ({"prompt": "The Diana x", "corrupt": {"position": "{x}"}}, NextToken()),
    ],
    ids=["prompt", "position", "reference", "corrupt"],
)
def test_rows_that_are_averaged_are_written_and_read_alike(target, readout, tiny_model):
    model, rows = tiny_model(), [row | {"x": x} for row, x in zip(ROWS, ("x", "The", "x"), strict=True)]
    scope = scope_of("next_token", {"mean": "rows"}, target=target).model_copy(update={"readout": readout})
    with pytest.raises(
        DataError, match=r"source\.mean: the averaged rows should have the same .* differ\. Leave"
    ):
        expand(scope, rows=rows, source=model, target=model)


def test_what_cannot_be_averaged_or_taken_off(tiny_model):
    model = tiny_model()

    def sweep(source, **options):
        scope = scope_of("next_token", source, target={"prompt": "x"}, **options)
        return expand(scope, rows=ROWS, source=model, target=model)

    with pytest.raises(DataError, match=r"no column 'sort' in every row\. .*Allowed: s, b, t, kind"):
        sweep({"mean": {"rows": "sort"}})
    with pytest.raises(
        DataError, match=r"position by position, and they have different numbers of positions\. Name one"
    ):
        sweep({"mean": "rows", "position": {"start": 0}})
    for source in ({"position": {"start": 0}}, {"position": {"each": "all"}, "mean": "positions"}):
        with pytest.raises(InputError, match=r"positions of source\.prompt and .* of source\.minus"):
            sweep(source | {"minus": "{b}"})
    with pytest.raises(PositionError, match=r"source\.minus='Tower' does not occur in"):
        sweep({"position": "Tower", "prompt": "The Tower", "minus": "{b}"})
    for source in ({"mean": "rows"}, {"mean": {"rows": "kind"}}):
        with pytest.raises(SpecError, match="has no prompt of its own; give target"):
            Patchscope(source=Source(prompt="x", **source))


def test_a_difference_is_compared_with_its_prompt(tiny_model, run_cells):
    """kl_nats is KL(source || patched), and source_top_ids the source's own."""
    scope = Patchscope(
        source=Source(prompt="{s}", minus="{b}", layer=[0, 2]),
        target=Target(prompt="{t}", position="x", layer=1),
        readout=NextToken(top_k=3, reference="source"),
    )
    found = same_in_every_way(
        run_cells, Optimisations.none(), scope, tiny_model(), rows=ROWS, controls=["unpatched"]
    )
    hand = Hand("llama")
    for cell, given in found:
        row, writes = ROWS[cell.row], []
        if cell.target_layer is not None:
            state = made(hand, row, cell, mean=False, minus=True)
            writes = [hand.write(1, cell.target_positions, lambda _, state=state: state)]
        source = torch.log_softmax(hand.run(ids_of(row["s"]))[-1], -1)
        patched = torch.log_softmax(hand.run(ids_of(row["t"]), *writes)[-1], -1)
        assert given["kl_nats"] == pytest.approx((source.exp() * (source - patched)).sum().item(), abs=1e-4)
        assert given["source_top_ids"] == source.topk(3).indices.tolist()
        assert given["reference_ids"] == given["source_top_ids"][:1]


@pytest.mark.parametrize(
    ("context", "other", "remote"),
    [
        ("session", None, False),
        ("session", None, "local"),
        ("nested", 1, False),
        ("bridged", 1, False),
        ("bridged", 1, "local"),
    ],
)
@pytest.mark.parametrize(
    ("family", "readout"), [("llama", "next_token"), ("gpt2", "generate"), ("opt", "hidden")]
)
def test_a_vector_from_a_file(readout, family, context, other, remote, *, files, tiny_model, run_cells):
    rows = [{"t": row["t"], "n": n} for row, n in zip(ROWS, (2, -1, "3"), strict=True)]
    target = None if other is None else tiny_model(family, seed=1)
    for source, numbers in (
        ({"vector": str(files / "one.safetensors")}, [0, 0, 0]),
        ({"vector": {"file": str(files / "more.safetensors"), "key": "one"}}, [1, 1, 1]),
        ({"vector": {"file": str(files / "more.safetensors"), "key": "rows", "index": "{n}"}}, [2, 4, 3]),
    ):
        scope = scope_of(readout, source | {"prompt": None, "layer": 0}, target={"write": "add"})
        options = {"rows": rows, "context": context, "remote": remote}
        found = run_cells(scope, tiny_model(family), target, **options)
        hand = Hand(family, **({} if other is None else {"seed": 1}))
        check(
            found,
            scope,
            hand,
            rows,
            lambda cell, _row, numbers=numbers: VECTORS[[numbers[cell.row]]],
            mode="add",
        )


def test_the_controls_of_a_vector(files, tiny_model, run_cells):
    """`shuffled` is another row's vector, and `random` one of its norm."""
    rows = [{"t": "x", "n": 2}, {"t": "x", "n": 4}]
    vector = {"file": str(files / "more.safetensors"), "key": "rows", "index": "{n}"}
    scope = scope_of("hidden", {"prompt": None, "vector": vector, "layer": 0})
    found = same_in_every_way(
        run_cells, Optimisations.none(), scope, tiny_model(), rows=rows, controls=["shuffled", "random"]
    )
    for cell, given in found:
        written = torch.tensor(given["hidden"][0])
        own, other = VECTORS[rows[cell.row]["n"]], VECTORS[rows[1 - cell.row]["n"]]
        if cell.control == "random":
            assert torch.isclose(written.norm(), own.norm(), rtol=1e-4)
            assert torch.cosine_similarity(written, own, dim=0).abs() < 0.9
        else:
            assert torch.allclose(written, own if cell.control is None else other)
    assert len(found) == 12


@pytest.mark.parametrize("source", ["vector", "minus", "mean"])
def test_a_model_of_another_dtype(source, files, run_cells):
    model = load(tiny.make_module("llama").bfloat16(), tokenizer=tiny.TOKENIZER)
    given = {
        "vector": {"prompt": None, "vector": str(files / "one.safetensors")},
        "minus": {"minus": "{b}"},
        "mean": {"position": {"start": 0}, "mean": "positions"},
    }[source]
    for optimisations in (Optimisations(), Optimisations.none()):
        scope = scope_of("hidden", given, target={"write": {"blend": 1}})
        found = run_cells(scope, model, rows=ROWS, optimisations=optimisations)
        for cell, read in found:
            state = VECTORS[:1] if source == "vector" else None
            if state is None:
                state = made(
                    Hand("llama"), ROWS[cell.row], cell, mean=source == "mean", minus=source == "minus"
                )
            assert torch.allclose(torch.tensor(read["hidden"]), state, atol=1, rtol=0.1)
