"""Laws: what holds of every Patchscope, whatever its prompts, positions and layers."""

from __future__ import annotations

import hooks
import hypothesis
import pytest
import tiny
import torch
from hypothesis import settings
from hypothesis import strategies as st

from patchscope_nn.mappings import Affine
from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target

FAMILIES = ("llama", "gpt2", "gemma3", "opt")
WORDS = (
    "The",
    " Eiffel",
    " Tower",
    " is",
    " in",
    " the",
    " city",
    " of",
    " Paris",
    "Diana",
    " x",
    "->",
    "\n",
)
READOUTS = {
    "next_token": NextToken(reference="source"),
    "named": NextToken(reference=["{a}", " Paris"]),
    "generate": Generate(max_new_tokens=4, stop="a"),
    "sample": Generate(max_new_tokens=4, temperature=1.0, seed=5),
    "choices": Choices(["{a}", " Paris"]),
    "hidden": Hidden(),
}
MAPPINGS = ("identity", "target_norm")
LAYERS = ("embed", 0, 2, -1)
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map("".join)
rows_of_data = st.lists(st.fixed_dictionaries({"s": texts, "t": texts, "a": texts}), min_size=2, max_size=5)
readouts = pytest.mark.parametrize("readout", READOUTS)
few = settings(max_examples=5)


@st.composite
def scopes(draw, readout, *, in_order=False):
    layers = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=2, unique=True))
    target_layers = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=2, unique=True))
    if in_order:
        layers, target_layers = [min(layers, key=LAYERS.index)], [max(layers, key=LAYERS.index)]
    positions = st.sampled_from([0, -1, {"each": [0, -1]}])
    return Patchscope(
        source=Source(prompt="{s}", position=draw(positions), layer=layers),
        target=Target(prompt="{t}", position=draw(positions), layer=target_layers),
        readout=READOUTS[readout],
    )


def by_key(found):
    return {cell.number: readout for cell, readout in found}


def assert_equal_runs(one, other):
    one, other = by_key(one), by_key(other)
    assert one.keys() == other.keys()
    for key, readout in one.items():
        hooks.assert_same(readout, other[key])


#: If the log-probabilities of two tokens differ by less than this, in nats, rounding decides their order: a
#: batch of another size sums float32 terms in another order. That changed log-probabilities by up to 6e-6.
ROUNDING = 2e-5


def ranks(found):
    return {cell.number: given.get("reference_ranks") for cell, given in found}


def with_ranks_of_ties(found, every, whole):
    """Return `found` with the ranks of `every`; only tokens that tie with a token may change its rank.

    Args:
        found: Cells and their readouts.
        every: The same cells, computed in another way.
        whole: The same cells, each with the probabilities of all tokens.
    """
    expected, whole, same = by_key(every), by_key(whole), []
    for cell, given in found:
        other, logprobs = expected[cell.number], torch.tensor(whole[cell.number]["top_probs"]).log()
        columns = (given["reference_ranks"], other["reference_ranks"], other["reference_logprobs"])
        for one, two, own in zip(*columns, strict=True):
            first, last = 1 + (logprobs > own + ROUNDING).sum(), (logprobs >= own - ROUNDING).sum()
            assert one == two or first <= min(one, two) < max(one, two) <= last, (cell, one, two)
        same.append((cell, given | {"reference_ranks": other["reference_ranks"]}))
    return same


@readouts
@few
@hypothesis.given(data=st.data())
def test_a_state_in_its_own_place_changes_nothing(readout, data, tiny_model, run_cells):
    row = {"s": data.draw(texts), "a": data.draw(texts)}
    count = len(tiny.TOKENIZER(row["s"])["input_ids"])
    start = data.draw(st.integers(0, count - 1))
    family = data.draw(st.sampled_from(FAMILIES))
    scope = Patchscope(
        source=Source(
            prompt="{s}",
            position={"start": start, "end": data.draw(st.integers(start + 1, count))},
            layer=["embed", "all"],
            site="residual",
        ),
        readout=READOUTS[readout] if readout != "sample" else Generate(max_new_tokens=5),
    )
    found = run_cells(scope, tiny_model(family), rows=[row], controls=["unpatched"])
    assert len(found) == 2 + tiny.N_LAYERS
    if readout == "hidden":
        reference, ids = tiny.reference(family), tiny.TOKENIZER(row["s"])["input_ids"]
        for cell, given in found[1:]:
            states = reference.state(ids, hooks.Site(cell.source_layer), cell.source_positions)
            hooks.assert_same(given, {"hidden": states.tolist()})
    else:
        for _, given in found[1:]:
            hooks.assert_same(given, found[0][1])


@pytest.mark.parametrize("site", ["attention", "mlp"])
@few
@hypothesis.given(data=st.data())
def test_a_parts_output_in_its_own_place_changes_nothing(site, data, tiny_model, run_cells):
    scope = Patchscope(
        source=Source(prompt="{s}", position={"each": [0, -1]}, layer="all", site=site),
        target=Target(site=site),
        readout=NextToken(),
    )
    model, row = tiny_model(data.draw(st.sampled_from(FAMILIES))), {"s": data.draw(texts)}
    first, *found = run_cells(scope, model, rows=[row], controls=["unpatched"])
    assert found
    for _, given in found:
        hooks.assert_same(given, first[1])


@readouts
@few
@hypothesis.given(data=st.data())
def test_permuted_rows_give_permuted_results(readout, data, tiny_model, run_cells):
    rows, scope = data.draw(rows_of_data), data.draw(scopes(readout))
    model = tiny_model(data.draw(st.sampled_from(FAMILIES)))
    order = data.draw(st.permutations(range(len(rows))))
    controls = ["unpatched", "random"]
    straight = run_cells(scope, model, rows=rows, controls=controls)
    permuted = run_cells(scope, model, rows=[rows[row] for row in order], controls=controls)
    for new, old in enumerate(order):
        there = [given for cell, given in permuted if cell.row == new]
        here = [given for cell, given in straight if cell.row == old]
        assert len(there) == len(here) > 0
        for given, expected in zip(there, here, strict=True):
            hooks.assert_same(given, expected)


@readouts
@few
@hypothesis.given(data=st.data())
def test_budgets_change_nothing(readout, data, tiny_model, run_cells):
    """Batches and steps of any size: other padding, other neighbours, states carried or not."""
    rows, scope = data.draw(rows_of_data), data.draw(scopes(readout))
    model = tiny_model(data.draw(st.sampled_from(FAMILIES)))
    options = {"rows": rows, "controls": ["unpatched", "random"], "context": "session"}
    budgets = {"max_rows": data.draw(st.integers(1, 7)), "memory": data.draw(st.integers(1, 10**6))}
    assert_equal_runs(run_cells(scope, model, **options, **budgets), run_cells(scope, model, **options))


@readouts
def test_one_row_a_pass_changes_nothing(readout, tiny_model, run_cells):
    """The smallest budget there is, for all cells of a whole sweep: no padding at all, and many steps."""
    rows = [
        {"s": "The Eiffel Tower is", "t": "x", "a": " in"},
        {"s": "x", "t": "Diana is in x", "a": " of Paris"},
    ]
    scope = Patchscope(
        source=Source(prompt="{s}", position=-1, layer=[0, -1]),
        target=Target(prompt="{t}", position="x", layer=["embed", -1]),
        readout=READOUTS[readout],
    )
    options = {"rows": rows, "controls": ["unpatched", "random", "shuffled"], "context": "session"}
    for family in FAMILIES:
        one = run_cells(scope, tiny_model(family), **options, max_rows=1)
        assert_equal_runs(one, run_cells(scope, tiny_model(family), **options))


@readouts
@settings(max_examples=4)  # of 13 sweeps each
@hypothesis.given(data=st.data())
def test_an_optimisation_changes_nothing(readout, data, tiny_model, run_cells):
    """Also for data with equal rows and target prompts that begin alike, which is what they are made for."""
    begin = data.draw(texts)
    rows = [row | {"t": begin + row["t"]} for row in data.draw(rows_of_data)]
    scope, model = data.draw(scopes(readout)), tiny_model(data.draw(st.sampled_from(FAMILIES)))
    target = scope.target.model_copy(update={"position": data.draw(st.sampled_from([-1, 0]))})
    scope = scope.model_copy(update={"target": target, "mapping": data.draw(st.sampled_from(MAPPINGS))})
    options = {"rows": [*rows, rows[0]], "controls": ["unpatched", "random"], "context": "session"}
    every = run_cells(scope, model, **options)
    for off in Optimisations.names():
        hypothesis.note(f"without {off}")
        plain = run_cells(scope, model, **options, optimisations=Optimisations(**{off: False}))
        if ranks(plain) != ranks(every):
            # The rank of a reference token that ties with another depends on rounding. In gpt2, with the
            # embedding of 'The' as that of the last token of ' x in Tower', the logits of '.' and ' Pa' are
            # 0.2357034 and 0.2357046 in float64, and their order in float32 depends on the size of the batch.
            wide = scope.readout.model_copy(update={"top_k": tiny.VOCAB_SIZE})
            whole = run_cells(scope.model_copy(update={"readout": wide}), model, **options)
            plain = with_ranks_of_ties(plain, every, whole)
        assert_equal_runs(every, plain)


@readouts
@few
@hypothesis.given(data=st.data())
def test_contexts_change_nothing(readout, data, tiny_model, run_cells):
    rows, scope = data.draw(rows_of_data), data.draw(scopes(readout, in_order=True))
    family = data.draw(st.sampled_from(FAMILIES))
    model, copy = tiny_model(family), tiny_model(family, copy=1)
    options = {"rows": rows, "controls": ["unpatched", "random"]}
    session = run_cells(scope, model, context="session", **options)
    assert_equal_runs(run_cells(scope, model, context="fused", **options), session)
    assert_equal_runs(run_cells(scope, model, copy, context="nested", **options), session)
    assert_equal_runs(run_cells(scope, model, copy, context="bridged", **options), session)


@pytest.mark.quick
@few
@hypothesis.given(data=st.data())
def test_the_rehearsal_changes_nothing(data, tiny_model, run_cells):
    readout = data.draw(st.sampled_from(sorted(READOUTS)))
    rows, scope = data.draw(rows_of_data), data.draw(scopes(readout))
    model = tiny_model(data.draw(st.sampled_from(FAMILIES)))
    options = {"rows": rows, "controls": ["unpatched", "random"]}
    assert_equal_runs(run_cells(scope, model, remote="local", **options), run_cells(scope, model, **options))


@readouts
@few
@hypothesis.given(data=st.data())
def test_a_resumed_run_runs_the_other_cells(readout, data, tiny_model, run_cells):
    rows, scope = data.draw(rows_of_data), data.draw(scopes(readout))
    model = tiny_model(data.draw(st.sampled_from(FAMILIES)))
    options = {"rows": rows, "controls": ["unpatched", "random"], "max_rows": 3}
    every = run_cells(scope, model, **options)
    done = data.draw(st.sets(st.sampled_from([cell.number for cell, _ in every])))
    left = run_cells(scope, model, done=done, **options)
    assert_equal_runs(left, [(cell, given) for cell, given in every if cell.number not in done])


@few
@hypothesis.given(data=st.data())
def test_target_norm_keeps_the_norm(data, tiny_model, run_cells):
    row = {"s": data.draw(texts), "t": data.draw(texts)}
    family = data.draw(st.sampled_from(FAMILIES))
    scope = Patchscope(
        source=Source(prompt="{s}", layer=list(LAYERS)),
        target=Target(prompt="{t}", layer=list(LAYERS)),
        mapping="target_norm",
        readout=Hidden(),
    )
    reference = tiny.reference(family)
    ids, target_ids = (tiny.TOKENIZER(row[name])["input_ids"] for name in "st")
    for cell, given in run_cells(scope, tiny_model(family), rows=[row]):
        state = reference.state(ids, hooks.Site(cell.source_layer), cell.source_positions)
        clean = reference.state(target_ids, hooks.Site(cell.target_layer), cell.target_positions)
        hooks.assert_same(given, {"hidden": (state / state.norm() * clean.norm()).tolist()})


def twice_less_one(states):
    return states * 2 - 1


WEIGHT = torch.randn(tiny.D_MODEL, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) / 4
BIAS = torch.linspace(-1, 1, tiny.D_MODEL)
NORM = torch.nn.LayerNorm(tiny.D_MODEL)


@pytest.mark.parametrize(
    ("mapping", "formula"),
    [
        pytest.param(Affine(WEIGHT, BIAS), lambda states, _: states @ WEIGHT.T + BIAS, id="affine"),
        pytest.param(Affine(WEIGHT), lambda states, _: states @ WEIGHT.T, id="linear"),
        pytest.param(NORM, lambda states, _: NORM(states).detach(), id="module"),
        pytest.param(twice_less_one, lambda states, _: states * 2 - 1, id="function"),
        pytest.param(
            "target_norm",
            lambda states, clean: (
                states / states.norm(dim=-1, keepdim=True) * clean.norm(dim=-1, keepdim=True)
            ),
            id="target_norm",
        ),
    ],
)
@pytest.mark.parametrize("context", ["fused", "session", "nested"])
@pytest.mark.parametrize("readout", ["next_token", "hidden"])
def test_a_mapping_is_its_formula(mapping, formula, context, readout, *, tiny_model, run_cells):
    rows = [{"s": "The Eiffel Tower", "t": "x in Paris"}, {"s": "Diana", "t": "the city of x"}]
    scope = Patchscope(
        source=Source(prompt="{s}", position=[0, -1], layer=[0, 1]),
        target=Target(prompt="{t}", position=[0, -1], layer=[1, 3]),
        mapping=mapping,
        readout=READOUTS[readout],
    )
    target = tiny_model(seed=1) if context == "nested" else None
    found = run_cells(scope, tiny_model(), target, rows=rows, controls=["unpatched"], context=context)
    other = tiny.reference("llama", seed=1) if context == "nested" else None
    pair = hooks.Pair(scope, tiny.reference("llama"), other, tokenizer=tiny.TOKENIZER, f=formula)
    for cell, given in found:
        hooks.assert_same(given, pair.expected(cell, rows[cell.row]))


@few
@hypothesis.given(data=st.data())
def test_random_states_have_the_norm_of_what_they_stand_for(data, tiny_model, run_cells):
    row = {"s": data.draw(texts), "t": data.draw(texts)}
    model = tiny_model(data.draw(st.sampled_from(FAMILIES)))
    scope = Patchscope(
        source=Source(prompt="{s}", position={"each": [0, -1]}, layer=list(LAYERS)),
        target=Target(prompt="{t}", layer=[0, 3]),
        mapping=twice_less_one,
        readout=Hidden(),
    )
    found = run_cells(scope, model, rows=[row], controls=["random"])
    states = [torch.tensor(given["hidden"]) for _, given in found]
    real, random = states[::2], states[1::2]
    assert [cell.control for cell, _ in found] == [None, "random"] * len(real)
    for one, other in zip(real, random, strict=True):
        assert torch.allclose(one.norm(dim=-1), other.norm(dim=-1), rtol=1e-4)
        assert torch.cosine_similarity(one, other).abs().max() < 0.9
    directions = torch.cat([one / one.norm() for one in random])
    assert (directions @ directions.T - torch.eye(len(random))).abs().max() < 0.9
    again = run_cells(scope, model, rows=[row], controls=["random"])
    assert [given for _, given in again] == [given for _, given in found]
    other = run_cells(scope, model, rows=[row], controls=["random"], seed=1)
    assert [given for _, given in other][::2] == [given for _, given in found][::2]
    assert all(
        one["hidden"] != two["hidden"] for (_, one), (_, two) in zip(other[1::2], found[1::2], strict=True)
    )


#: What is compared with the source's own prediction, and so is the row's own whatever it is shown.
COMPARED = {
    "next_token": {
        *("surprisal_nats", "kl_nats", "source_top_ids", "nll_nats"),
        *("reference_ids", "reference_logprobs", "reference_ranks"),
    },
    "named": {"surprisal_nats", "kl_nats", "source_top_ids"},
}


def without(readout, names):
    return {name: value for name, value in readout.items() if name not in names}


@pytest.mark.parametrize("readout", [name for name in READOUTS if name != "sample"])
@few
@hypothesis.given(data=st.data())
def test_shuffled_is_the_patch_with_the_other_rows_source(readout, data, tiny_model, run_cells):
    """With two rows the other one is known; only what the result is compared with stays the row's own."""
    first, second = data.draw(st.lists(texts, min_size=2, max_size=2, unique=True))
    targets = [data.draw(texts), data.draw(texts)]
    rows = [{"s": first, "t": targets[0], "a": " is"}, {"s": second, "t": targets[1], "a": " is"}]
    swapped = [rows[0] | {"s": second}, rows[1] | {"s": first}]
    scope = data.draw(scopes(readout))
    source = scope.source.model_copy(update={"position": data.draw(st.sampled_from([0, -1]))})
    scope = scope.model_copy(update={"source": source})
    model = tiny_model(data.draw(st.sampled_from(FAMILIES)))
    found = run_cells(scope, model, rows=rows, controls=["shuffled"])
    shuffled = [given for cell, given in found if cell.control == "shuffled"]
    own = [given for cell, given in found if cell.control is None]
    explicit = [given for _, given in run_cells(scope, model, rows=swapped)]
    for given, expected, mine in zip(shuffled, explicit, own, strict=True):
        compared = COMPARED.get(readout, set())
        if readout == "next_token":
            assert given["reference_ids"] == mine["reference_ids"]
        hooks.assert_same(without(given, compared), without(expected, compared))


@pytest.mark.parametrize("family", FAMILIES)
@few
@hypothesis.given(data=st.data())
def test_unpatched_is_the_plain_model(family, data, tiny_model, run_cells):
    readout = data.draw(st.sampled_from(["next_token", "named", "generate", "choices"]))
    rows, scope = data.draw(rows_of_data), data.draw(scopes(readout))
    found = run_cells(scope, tiny_model(family), rows=rows, controls=["unpatched"])
    pair = hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    plain = [(cell, given) for cell, given in found if cell.control == "unpatched"]
    assert {cell.row for cell, _ in plain} == set(range(len(rows)))
    for cell, given in plain:
        hooks.assert_same(given, pair.expected(cell, rows[cell.row]))


@pytest.mark.parametrize("context", ["session", "fused", "nested"])
def test_greedy_whatever_the_generation_config_asks(context, tiny_model, run_cells, monkeypatch):
    model, target = tiny_model(), tiny_model(copy=1) if context == "nested" else None
    scope = Patchscope(
        source=Source(prompt="The Eiffel Tower", layer="all"),
        target=Target(prompt="Diana x", position="x"),
        readout=Generate(max_new_tokens=10),
    )
    before = run_cells(scope, model, target, context=context)
    for side in (model, target or model):
        config = side.module.generation_config
        asked = {
            "do_sample": True,
            "temperature": 3.0,
            "repetition_penalty": 5.0,
            "no_repeat_ngram_size": 1,
            "min_new_tokens": 9,
            "max_new_tokens": 2,
            "num_beams": 3,
            "forced_eos_token_id": 7,
        }
        for name, value in asked.items():
            monkeypatch.setattr(config, name, value)
    assert run_cells(scope, model, target, context=context) == before
    pair = hooks.Pair(scope, tiny.reference("llama"), tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    for cell, given in before:
        hooks.assert_same(given, pair.expected(cell, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_the_model_as_it_was(family, tiny_model, run_cells):
    """No hook stays behind, no weight is touched."""
    model = tiny_model(family)
    ids = torch.tensor([tiny.TOKENIZER("The Eiffel Tower is in Paris")["input_ids"]])
    before = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    with torch.no_grad():
        logits = model.module(input_ids=ids).logits
    scope = Patchscope(
        source=Source(prompt="Diana", layer=["embed", "all"]),
        target=Target(prompt="x is"),
        mapping=lambda states: states * 100,
        readout=Generate(max_new_tokens=3),
    )
    for context in ("session", "fused"):
        run_cells(scope, model, context=context)
    with torch.no_grad():
        assert torch.equal(model.module(input_ids=ids).logits, logits)
    for name, weight in model.module.state_dict().items():
        assert torch.equal(weight, before[name])
