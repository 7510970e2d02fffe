"""How a state is written: modes, scales, sites, windows, many places, every token; against plain hooks."""

from __future__ import annotations

import dataclasses
import functools

import hooks
import noise
import pytest
import tiny
import torch
from by_hand import Hand, ids_of, same_in_every_way

from patchscope_nn.errors import InputError, SpecError
from patchscope_nn.models import Model
from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import expand

ROWS = (
    {"s": "The Eiffel Tower", "t": "Diana is in x ->", "a": " Paris"},
    {"s": "Diana", "t": "The city of x in the", "a": " the city"},
)
FAMILIES = ("llama", "gpt2", "gemma3", "opt")
READOUTS = {
    "next_token": NextToken(top_k=3),
    "generate": Generate(max_new_tokens=4),
    "choices": Choices(["{a}", " is in"]),
    "hidden": Hidden(clean=True),
}
readouts = pytest.mark.parametrize("readout", READOUTS)


def norm(states):
    return states.norm(dim=-1, keepdim=True)


#: What stands there after a write: of what stood there, the state, and the scale.
FORMULAS = {
    "replace": lambda clean, state, scale: (scale * state).expand_as(clean),
    "add": lambda clean, state, scale: clean + scale * state,
    "add_matched": lambda clean, state, scale: clean + scale * norm(clean) * state / norm(state),
    "blend": lambda clean, state, scale: 0.3 * scale * state + 0.7 * clean,
    "zero": lambda clean, state, scale: torch.zeros_like(clean),
}
WRITES = {name: {"blend": 0.3} if name == "blend" else name for name in FORMULAS}


def scope_of(readout, *, source=None, target=None, **options):
    return Patchscope(
        source=Source(**{"prompt": "{s}", "layer": ["embed", 2]} | (source or {})),
        target=Target(**{"prompt": "{t}", "position": "x", "layer": [0, 2]} | (target or {})),
        readout=READOUTS[readout],
        **options,
    )


def expected(scope, hand, cell, row, *, source=None):
    """A cell's readout by hooks, from what the scope asks and the places that the cell names."""
    target, ids, said = scope.target, ids_of(row["t"]), {}
    formula = FORMULAS[target.mode]
    source, layers = source or hand, []
    for step in range(target.window):
        own = step if target.states == "own" else 0
        if cell.target_layer is not None and cell.target_layer + step < len(hand.blocks):
            layers.append((cell.source_layer + own, cell.target_layer + step))

    def changes(count):
        # At every token that is decoded the last of several states is written.
        more = list(range(len(ids), count)) if target.every_step else []
        for layer, written in layers:
            state = None
            if target.needs_state:
                state = source.state(
                    ids_of(row["s"]), layer, cell.source_positions, site=_residual(scope.source.site)
                )
                state = state.expand(len(cell.target_positions), -1)
                state = torch.cat([state, state[-1:].expand(len(more), -1)])
            new = functools.partial(_noted, said, formula, state, cell.scale)
            yield hand.write(written, [*cell.target_positions, *more], new, site=_residual(scope.target.site))

    if scope.readout.name == "hidden":
        hand.run(ids, *changes(len(ids)))
        return said or {"hidden": None, "clean": None}
    texts = [ids_of(text.format(**row)) for text in READOUTS["choices"].continuations]
    return hand.read(scope.readout, ids, changes, continuations=texts)


def _residual(site):
    """Cells number the input of a block as the output of the one below."""
    return "residual" if site == "before" else site


def _noted(said, formula, state, scale, clean):
    new = formula(clean, state, scale)
    if not said:
        said.update(hidden=new.tolist(), clean=clean.tolist())
    return new


def check(found, scope, hand, rows=ROWS, **options):
    for cell, given in found:
        hooks.assert_same(given, expected(scope, hand, cell, rows[cell.row], **options))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("family", "readout"), [*zip(FAMILIES, READOUTS, strict=True)])
def test_a_write_is_its_formula(write, family, readout, tiny_model, run_cells):
    scale = [1] if write == "zero" else [1, -0.5]
    for site in ("residual", "mlp") if write in ("add", "zero") else ("residual",):
        scope = scope_of(readout, target={"write": WRITES[write], "scale": scale, "site": site})
        options = {"rows": ROWS, "controls": ["unpatched"], "context": "session"}
        found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
        assert len(found) == 2 + 2 * (2 if write == "zero" else 4) * len(scale)
        check(found, scope, Hand(family))


@pytest.mark.parametrize("write", ["replace", "add_matched", "blend"])
@readouts
def test_a_write_is_its_formula_with_the_keys_of_earlier_blocks(write, readout, tiny_model, run_cells):
    """On segments, where what is looked at has to be there, if only for the last token that is written."""
    for position in ({"each": ["x", -1]}, -1):
        scope = scope_of(readout, target={"write": WRITES[write], "position": position})
        found = run_cells(scope, tiny_model(), rows=ROWS, context="session")
        check(found, scope, Hand("llama"))


@pytest.mark.parametrize("context", ["fused", "session"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_of_a_block(family, context, tiny_model, run_cells):
    """It is the output of the block below; of block 0, the embeddings."""
    scope = scope_of(
        "next_token",
        source={"site": "before", "layer": [0, 2]},
        target={"site": "before", "layer": [2, 3], "write": "add"},
    )
    found = run_cells(scope, tiny_model(family), rows=ROWS, context=context)
    check(found, scope, Hand(family))
    hand = Hand(family)
    for cell, given in found[:4]:
        ids, layers = ids_of(ROWS[0]["t"]), (cell.source_layer + 1, cell.target_layer + 1)
        state = hand.state(ids_of(ROWS[0]["s"]), layers[0], cell.source_positions, site="before")
        write = hand.write(layers[1], cell.target_positions, lambda clean: clean + state, site="before")  # noqa: B023
        hooks.assert_same(given, hooks.next_token(hand.run(ids, write)[-1], top_k=3))


def test_sites_meet_where_layers_are_the_same(tiny_model):
    """`same` pairs l with l as each site counts it, and tables say these."""
    for read, written, pairs in (
        ("residual", "before", [(1, 0), (3, 2)]),
        ("before", "residual", [(0, 1), (2, 3)]),
        ("before", "before", [(0, 0), (2, 2)]),
    ):
        scope = scope_of(
            "hidden", source={"site": read, "layer": [1, 3]}, target={"site": written, "layer": "same"}
        )
        model = tiny_model()
        sweep = expand(scope, rows=ROWS[:1], source=model, target=model)
        assert [(cell.source_layer, cell.target_layer) for cell in sweep.cells] == pairs
        shown = [
            (cell.source_layer + sweep.shifts[0], cell.target_layer + sweep.shifts[1]) for cell in sweep.cells
        ]
        assert shown == [(1, 1), (3, 3)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("site", ["residual", "mlp"])
@pytest.mark.parametrize("states", ["one", "own"])
@pytest.mark.parametrize("readout", ["next_token", "generate", "hidden"])
def test_a_window(readout, states, site, family, *, tiny_model, run_cells):
    target = {"window": 2, "states": states, "site": site, "layer": "same" if states == "own" else [0, -1]}
    scope = scope_of(readout, source={"layer": [0, 2, -1], "site": site}, target=target)
    found = same_in_every_way(
        run_cells, Optimisations.none(), scope, tiny_model(family), rows=ROWS, max_rows=5
    )
    check(found, scope, Hand(family))


@pytest.mark.parametrize("context", ["nested", "bridged"])
def test_a_window_of_own_states_ends_with_either_model(context, tiny_model, run_cells):
    scope = scope_of(
        "next_token", source={"layer": "all"}, target={"window": 3, "states": "own", "layer": "same"}
    )
    deep = tiny_model("gpt2", n_layers=6)
    found = run_cells(scope, tiny_model(), deep, rows=ROWS, context=context, max_rows=3)
    source, target = Hand("llama"), Hand("gpt2", n_layers=6)
    for cell, given in found:
        ids, row = ids_of(ROWS[cell.row]["t"]), ROWS[cell.row]
        writes = []
        for layer in range(cell.source_layer, min(cell.source_layer + 3, tiny.N_LAYERS)):
            state = source.state(ids_of(row["s"]), layer, cell.source_positions)
            writes.append(target.write(layer, cell.target_positions, lambda _, state=state: state))
        hooks.assert_same(given, hooks.next_token(target.run(ids, *writes)[-1], top_k=3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("readout", ["generate", "choices"])
@pytest.mark.parametrize("write", ["replace", "add"])
def test_every_step(write, readout, family, tiny_model, run_cells):
    """Each decoded token is written at, too; what was written before stays in its keys and values."""
    scope = scope_of(readout, target={"write": write, "every_step": True, "scale": [0.5], "window": 2})
    rehearsed = family == "llama"
    options = {"rows": ROWS, "controls": ["unpatched"], "rehearsed": rehearsed}
    found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
    check(found, scope, Hand(family))


def test_every_step_differs_from_once_and_writes_the_last_of_several_states(tiny_model, run_cells):
    target = {"position": [0, "x"], "write": "add"}
    once = scope_of("generate", source={"position": [0, -1]}, target=target)
    rows = ROWS[:1]
    scope = once.model_copy(update={"target": once.target.model_copy(update={"every_step": True})})
    found = run_cells(scope, tiny_model(), rows=rows)
    check(found, scope, Hand("llama"), rows)
    assert [given for _, given in found] != [given for _, given in run_cells(once, tiny_model(), rows=rows)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@readouts
def test_one_state_in_many_places(readout, family, tiny_model, run_cells):
    rows = [{"s": "Diana", "t": "x is x in x", "a": " Paris"}]
    for write in ("replace", "add_matched"):
        scope = scope_of(readout, target={"position": {"every": "x"}, "write": write})
        found = same_in_every_way(
            run_cells, Optimisations.none(), scope, tiny_model(family), rows=rows, context="session"
        )
        assert {cell.target_positions for cell, _ in found} == {(0, 3, 6)}
        check(found, scope, Hand(family), rows)
    fused = run_cells(scope_of(readout, target={"position": {"every": "x"}}), tiny_model(family), rows=rows)
    for cell, given in fused:
        hooks.assert_same(given, expected(scope_of(readout), Hand(family), cell, rows[0]))


def test_a_random_state_in_many_places_is_one(tiny_model, run_cells):
    """As the real one is; and it has the norm of the state, in each block of a window that of its own."""
    rows = [{"s": "Diana", "t": "x is x in x"}]
    for window in (1, 2):
        scope = scope_of("hidden", target={"position": {"every": "x"}, "window": window})
        found = run_cells(scope, tiny_model(), rows=rows, controls=["random"])
        for (_, real), (cell, random) in zip(found[::2], found[1::2], strict=True):
            assert cell.control == "random"
            assert random["hidden"][0] == random["hidden"][1] == random["hidden"][2]
            sizes = [torch.tensor(one["hidden"][0]).norm() for one in (real, random)]
            assert torch.isclose(*sizes, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_noise_is_so_many_deviations_of_the_state(family, tiny_model, run_cells):
    hand = Hand(family)
    for readout in ("hidden", "next_token"):
        scope = scope_of(readout, target={"write": {"noise": 2}, "position": ["x", -1]})
        found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), rows=ROWS)
        assert len(found) == 4
        for cell, given in found:
            drawn = torch.stack([noise.normal(cell.seed, draw, tiny.D_MODEL) for draw in range(2)])

            def noisy(clean, drawn=drawn):
                return clean + 2 * clean.std(dim=-1, keepdim=True) * drawn

            ids, at = ids_of(ROWS[cell.row]["t"]), cell.target_positions
            if readout == "hidden":
                clean = hand.state(ids, cell.target_layer, at)
                hooks.assert_same(given, {"hidden": noisy(clean).tolist(), "clean": clean.tolist()})
            else:
                write = hand.write(cell.target_layer, at, noisy)
                hooks.assert_same(given, hooks.next_token(hand.run(ids, write)[-1], top_k=3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_relevancy_is_the_probability_of_each_token_with_and_without_the_patch(family, tiny_model, run_cells):
    scope = Patchscope(
        source=Source(prompt="{s}", layer=[0, 2]),
        target=Target(prompt="{t}", position="x", layer=[1]),
        readout=Generate(max_new_tokens=4, relevancy=True),
    )
    hand = Hand(family)
    options = {"rows": ROWS, "controls": ["unpatched"], "rehearsed": family == "llama"}
    for every_step in (False, True):
        target = scope.target.model_copy(update={"every_step": every_step})
        scope = scope.model_copy(update={"target": target})
        found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
        for cell, given in found:
            row = ROWS[cell.row]
            ids = ids_of(row["t"])
            said = expected(scope, hand, cell, row)
            whole = (*ids, *said["token_ids"])
            writes = []
            if cell.target_layer is not None:
                state = hand.state(ids_of(row["s"]), cell.source_layer, cell.source_positions)
                at = [*cell.target_positions, *(range(len(ids), len(whole)) if every_step else ())]
                writes.append(hand.write(1, at, lambda clean, state=state: state.expand_as(clean)))
            for name, logits in (
                ("token_probs", hand.run(whole, *writes)),
                ("unpatched_token_probs", hand.run(whole)),
            ):
                probs = torch.softmax(logits, -1)
                said[name] = [
                    probs[len(ids) + place - 1, token].item() for place, token in enumerate(said["token_ids"])
                ]
            hooks.assert_same(given, said)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("readout", ["next_token", "generate", "choices"])
def test_an_ensemble_that_names_the_layer_beside_the_text_alone(readout, family, tiny_model, run_cells):
    """Each cell is the run of its own T; `text-only` is the plain model on T with the source's text in it."""
    scope = scope_of(
        readout,
        source={"layer": [0, 2]},
        target={"prompt": None, "prompts": ["{t}", "The {source_layer} is x"], "layer": "same"},
    )
    options = {"rows": ROWS, "controls": ["text-only"], "context": "session"}
    found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
    texts = [
        (number, text)
        for number, row in enumerate(ROWS)
        for text in (
            *(row["t"], row["t"], row["t"].replace("x", row["s"])),
            *("The 0 is x", "The 2 is x", f"The 2 is {row['s']}"),
        )
    ]
    for (cell, given), (number, text) in zip(found, texts, strict=True):
        assert (cell.row, cell.control is None) == (number, text.endswith("x") or text == ROWS[number]["t"])
        said = expected(scope, Hand(family), cell, ROWS[number] | {"t": text})
        hooks.assert_same(given, said)


def test_every_step_of_what_decodes_nothing(tiny_model):
    model = tiny_model()
    with pytest.raises(InputError) as raised:
        expand(scope_of("next_token", target={"every_step": True}), rows=ROWS, source=model, target=model)
    assert str(raised.value) == (
        "target.every_step writes at every decoded token, and readout: next_token decodes none. "
        "Use readout: generate or choices, or leave every_step out."
    )


def weightless(model, **parts):
    """A model's description, with other parts of its architecture."""
    architecture = dataclasses.replace(model.info.architecture, **parts)
    info = dataclasses.replace(model.info, architecture=architecture)
    return Model(info=info, tokenizer=model.tokenizer, traced=None)


@pytest.mark.parametrize(
    ("target", "parts", "message"),
    [
        pytest.param(
            {"write": {"cut": {"position": 0}}},
            {"parts": ()},
            "target.write: cut needs blocks that accept an attention mask in a known form; the blocks of "
            "LlamaForCausalLM (llama) do not. Use write: zero, or another model.",
            id="cut without an attention",
        ),
        pytest.param(
            {"write": {"cut": {"position": 0}}},
            {"windows": ()},
            "target.write: cut needs blocks that accept an attention mask in a known form; the blocks of "
            "LlamaForCausalLM (llama) do not. Use write: zero, or another model.",
            id="cut where it is not known what is seen",
        ),
        pytest.param(
            {"write": {"cut": {"position": 0}}, "layer": ["embed", 1]},
            {},
            "target.write: cut changes the attention of the blocks l*, and cannot be used with target.layer: "
            "embed. Leave target.layer: embed out.",
            id="cut of embeddings",
        ),
        pytest.param(
            {"write": {"cut": {"position": 0}}, "site": "before"},
            {},
            "target.write: cut changes the attention of the blocks l*, and cannot be used with target.site: "
            "before. Leave target.site: before out.",
            id="cut of an input",
        ),
        pytest.param(
            {"every_step": True},
            {"arguments": ("input_ids",)},
            "target.every_step writes while decoding from cached keys and values, and llama keeps none. "
            "Leave every_step out.",
            id="every step without a cache",
        ),
        pytest.param(
            {"every_step": True, "write": {"cut": {"position": 0}}},
            {},
            "target.every_step writes at every decoded token, and target.write: cut writes nothing. "
            "Leave every_step out.",
            id="every step and a cut",
        ),
        pytest.param(
            {"window": 2, "states": "own"},
            {},
            "target.states: own writes the state of block l + k in block l* + k, and needs l* = l. "
            "Use target.layer: same, or states: one.",
            id="own states without same",
        ),
        pytest.param(
            {"write": "zero", "scale": [1, 2]},
            {},
            "target.scale multiplies f(h), and target.write: zero writes none. "
            "Leave scale out; noise and blend have their own number.",
            id="scaled nothing",
        ),
    ],
)
def test_what_does_not_go_together(target, parts, message, tiny_model):
    model = weightless(tiny_model(), **parts)
    with pytest.raises(InputError) as raised:
        expand(scope_of("generate", target=target), rows=ROWS, source=model, target=model)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "target", [{"corrupt": {"position": 0}}, {"soft_prompt": "f"}, {"write": {"cut": {"position": 0}}}]
)
def test_relevancy_needs_a_prompt_as_it_is(target):
    with pytest.raises(
        SpecError, match=r"relevancy compares with T unpatched, .*; leave out one or the other"
    ):
        Patchscope(
            source=Source(prompt="x"),
            target=Target(prompt="y", **target),
            readout=Generate(relevancy=True),
        )


@pytest.mark.parametrize(
    ("write", "control", "message"),
    [
        ("zero", "random", "random replaces a state, and target.write: zero writes none; leave it out"),
        ("zero", "shuffled", "shuffled replaces a state, and target.write: zero writes none; leave it out"),
        ({"noise": 1}, "random", "target.write: noise writes none; leave it out"),
        ({"cut": {"position": 0}}, "shuffled", "target.write: cut writes none; leave it out, or use random"),
    ],
)
def test_controls_that_stand_for_a_state_need_one(write, control, message, tiny_model):
    scope = scope_of("next_token", target={"write": write})
    with pytest.raises(SpecError) as raised:
        expand(scope, rows=ROWS, controls=[control], source=tiny_model(), target=tiny_model())
    assert str(raised.value).endswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"write": "replaced"}, "target.write: 'replaced' is not a valid write. Did you mean 'replace'?"),
        ({"write": {"blend": 1.5}}, "target.write: blend: 1.5 should be a number in 0..1"),
        ({"write": {"noise": "much"}}, "target.write: noise: 'much' should be a number of at least 0"),
        ({"write": {"cut": 3}}, "target.write: {'cut': 3} is not a valid write."),
        ({"window": 0}, "target.window: input should be greater than or equal to 1; given 0"),
        ({"states": "own"}, "states: own needs a window; give window, 2 or more"),
        ({"prompts": ["x", "y"]}, "give either prompt or prompts"),
        ({"scale": []}, "target.scale: tuple should have at least 1 item after validation, not 0"),
    ],
)
def test_what_is_no_write(fields, message):
    with pytest.raises(SpecError) as raised:
        Patchscope(source=Source(prompt="x"), target={"prompt": "y", **fields})
    assert message in str(raised.value)
