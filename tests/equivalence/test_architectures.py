"""Every architecture, against plain hooks: readouts in a session, all contexts, sites, several tokens.

Three data rows of different length make every pass padded; the layers hold the embedding, the first, a middle
and the last block; the token `x` stands before the last one, where the readout is, and both are patched.
"""

from __future__ import annotations

from collections import Counter

import hooks
import pytest
import tiny

from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target

ROWS = (
    {"s": "The Eiffel Tower is in", "t": "Diana is in Paris x ->", "a": " Paris", "b": " the city of"},
    {"s": "Diana", "t": "x is", "a": " Diana of Paris", "b": " in"},
    {"s": "Paris is the city of the", "t": "The Tower of x in the city of Paris,", "a": " E", "b": "el x"},
)
LAYERS = ["embed", 2, -1]
EACH = {"each": ["x", -1]}
TARGET_LAYERS = ["embed", 0, 2, -1]
MAX_NEW_TOKENS = 5
READOUTS = {
    "source_reference": NextToken(top_k=4, reference="source"),
    "named_reference": NextToken(top_k=3, reference=["{a}", "{b}"]),
    "generate": Generate(max_new_tokens=MAX_NEW_TOKENS),
    "choices": Choices(["{a}", "{b}", " Tower"]),
    "hidden": Hidden(),
}
OPTIMISED = ("source_reference", "generate", "choices", "hidden")
SITES = (("attention", "residual"), ("residual", "mlp"), ("mlp", "attention"))
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def scope_of(readout, *, source=None, target=None, layers=LAYERS, target_layers=TARGET_LAYERS, **options):
    return Patchscope(
        source=Source(**{"prompt": "{s}", "position": -2, "layer": layers} | (source or {})),
        target=Target(**{"prompt": "{t}", "position": EACH, "layer": target_layers} | (target or {})),
        readout=readout,
        **options,
    )


def check(found, rows, pair):
    """Every cell equals the reference, and the patch changes what many cells say.

    Not all: at the last layer a patch of `x` comes too late for the last token, and greedy tokens may stay.
    """
    for cell, given in found:
        hooks.assert_same(given, pair.expected(cell, rows[cell.row]))
    plain = {cell.row: given for cell, given in found if cell.control == "unpatched"}
    patched = [given != plain[cell.row] for cell, given in found if cell.control is None]
    assert sum(patched) >= len(patched) / 3


@families
@pytest.mark.parametrize("readout", ["source_reference", "choices", "hidden"])
def test_readouts_in_a_session(family, readout, tiny_model, run_cells):
    scope = scope_of(READOUTS[readout])
    rows = ROWS[1:] if readout == "choices" else ROWS
    found = run_cells(scope, tiny_model(family), rows=rows, controls=["unpatched"], context="session")
    assert len(found) == len(rows) * 2 * (1 + 3 * 4)
    check(found, rows, hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER))


@families
def test_generate_in_a_session(family, tiny_model, run_cells, monkeypatch):
    """With an end of text and a stop string chosen among what the models really say."""
    model, pair = tiny_model(family), hooks.Pair(None, tiny.reference(family), tokenizer=tiny.TOKENIZER)
    pair.scope = scope_of(READOUTS["generate"])
    cells = run_cells(pair.scope, model, rows=ROWS[1:], controls=["unpatched"], context="session")
    said = [pair.expected(cell, ROWS[1:][cell.row])["token_ids"] for cell, _ in cells]
    later = Counter(token for ids in said for token in set(ids[1:]) - {tiny.EOS_ID})
    (end, _), *others = later.most_common()
    monkeypatch.setattr(model.module.generation_config, "eos_token_id", [tiny.EOS_ID, end])
    texts = (tiny.TOKENIZER.decode([one]) for one, _ in others)
    stop = next(text for text in texts if text.strip() and text not in tiny.TOKENIZER.decode([end]))
    scope = scope_of(Generate(max_new_tokens=MAX_NEW_TOKENS, stop=stop))
    found = run_cells(scope, model, rows=ROWS[1:], controls=["unpatched"], context="session")
    stops = [one for one in range(tiny.VOCAB_SIZE) if stop in tiny.TOKENIZER.decode([one])]
    for (_, given), ids in zip(found, said, strict=True):
        hooks.assert_same(given, hooks.cut(ids, eos=[tiny.EOS_ID, end], stops=stops))
    assert {given["stopped"] for _, given in found} >= {"eos", "stop"}
    assert len({tuple(ids) for ids in said}) > len(said) / 4


@families
@pytest.mark.parametrize(
    ("context", "readout"),
    [
        ("fused", "source_reference"),
        ("fused", "generate"),
        ("fused", "choices"),
        ("fused", "hidden"),
        ("nested", "source_reference"),
        ("nested", "generate"),
        ("nested", "choices"),
        ("nested", "hidden"),
        ("bridged", "source_reference"),
    ],
)
def test_contexts(family, context, readout, tiny_model, run_cells):
    """Two models are two sets of weights; fused takes the layers with l <= l*."""
    model, reference, target, target_reference = tiny_model(family), tiny.reference(family), None, None
    layers, target_layers = ["embed", 0, 2], [2, -1]
    if context != "fused":
        layers, target_layers = [0, -1], ["embed", 2, -1]
        target, target_reference = tiny_model(family, seed=1), tiny.reference(family, seed=1)
    scope = scope_of(READOUTS[readout], layers=layers, target_layers=target_layers)
    rows = ROWS if readout == "source_reference" else ROWS[1:]
    found = run_cells(scope, model, target, rows=rows, controls=["unpatched"], context=context)
    pair = hooks.Pair(scope, reference, target_reference, tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    check(found, rows, pair)


@families
@pytest.mark.parametrize("context", ["fused", "session", "nested"])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_last_block_onto_the_last_block(family, context, readout, tiny_model, run_cells):
    """Where transformers' own `hidden_states` are normed already, and ours are not."""
    target = tiny_model(family, copy=1) if context == "nested" else None
    scope = scope_of(READOUTS[readout], target={"position": -1}, layers=[-1], target_layers=[-1])
    found = run_cells(scope, tiny_model(family), target, rows=ROWS[1:], context=context)
    assert [cell.source_layer for cell, _ in found] == [tiny.N_LAYERS - 1] * 2
    pair = hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    for cell, given in found:
        hooks.assert_same(given, pair.expected(cell, ROWS[1:][cell.row]))


#: What is switched off: one optimisation, or all of them.
OFF = {name: Optimisations(**{name: False}) for name in Optimisations.names()} | {"all": Optimisations.none()}


def shares(family, readout):
    """What `make test` switches off for a family and a readout; `make test-registry` has the rest of OFF.

    Each is switched off once in every family and, over the families, with every readout.
    """
    shift = [*tiny.FAMILIES].index(family) + OPTIMISED.index(readout)
    return [name for number, name in enumerate(OFF) if (number + shift) % len(OPTIMISED) == 0]


@families
@pytest.mark.parametrize("readout", OPTIMISED)
@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.registry)])
def test_every_optimisation_off_gives_the_same(family, readout, rest, tiny_model, run_cells):
    """Prompts that begin alike, equal rows, cells enough for many passes."""
    scope = scope_of(READOUTS[readout], layers=[0, -1], target_layers=["embed", 2, -1])
    model = tiny_model(family)
    rows = [row | {"t": f"The city of the Tower {row['t']}"} for row in ROWS[1:]]
    options = {"rows": [*rows, rows[0]], "controls": ["unpatched"], "context": "session", "max_rows": 8}
    found = run_cells(scope, model, **options)
    for name, used in OFF.items():
        if rest is (name in shares(family, readout)):
            continue
        plain = run_cells(scope, model, **options, optimisations=used)
        for (cell, given), (other, expected) in zip(found, plain, strict=True):
            assert cell == other
            hooks.assert_same(given, expected)


def test_every_optimisation_is_off_in_every_family_and_with_every_readout():
    pairs = [(family, readout) for family in tiny.FAMILIES for readout in OPTIMISED]
    for off in OFF:
        where = [pair for pair in pairs if off in shares(*pair)]
        assert sorted(family for family, _ in where) == sorted(tiny.FAMILIES)
        assert {readout for _, readout in where} == {*OPTIMISED}


@families
@pytest.mark.parametrize(("read", "written"), SITES)
def test_sites(family, read, written, tiny_model, run_cells):
    scope = scope_of(
        READOUTS["named_reference"],
        source={"site": read},
        target={"site": written},
        layers=[0, 2, -1],
        target_layers=[0, 2, -1],
    )
    found = run_cells(scope, tiny_model(family), rows=ROWS, controls=["unpatched"], context="session")
    check(found, ROWS, hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER))


@families
def test_sites_in_a_fused_trace(family, tiny_model, run_cells):
    scope = scope_of(
        READOUTS["named_reference"],
        source={"site": "mlp"},
        target={"site": "mlp"},
        layers=[0, 1],
        target_layers=[1, -1],
    )
    found = run_cells(scope, tiny_model(family), rows=ROWS, controls=["unpatched"], context="fused")
    check(found, ROWS, hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER))


@families
@pytest.mark.parametrize("readout", ["source_reference", "generate", "hidden"])
def test_several_tokens(family, readout, tiny_model, run_cells):
    """A span of the source is written onto a list of the target, one to one, the last token included."""
    scope = scope_of(
        READOUTS[readout],
        source={"position": {"start": -3, "end": -1}},
        target={"position": ["x", -1]},
        layers=["embed", 2],
        target_layers=[0, -1],
    )
    found = run_cells(scope, tiny_model(family), rows=ROWS, controls=["unpatched"], context="session")
    pair = hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    check(found, ROWS, pair)
