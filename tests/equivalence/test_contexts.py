"""Fused, session, nested and bridged: one meaning, however a step is run; and the rehearsal."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch
from own_mappings import Bent, doubled

from patchscope_nn.errors import MappingError
from patchscope_nn.mappings import Affine
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target

ROWS = (
    {"s": "The Eiffel Tower is in", "t": "Diana is in Paris x ->", "a": " Paris of"},
    {"s": "Diana", "t": "x is", "a": " in the city of"},
)
READOUTS = {
    "next_token": NextToken(),
    "source_reference": NextToken(reference="source", position=-2),
    "named_reference": NextToken(reference=["{a}", "x"]),
    "generate": Generate(max_new_tokens=5),
    "generate_stop": Generate(max_new_tokens=8, stop="a"),
    "sample": Generate(max_new_tokens=5, temperature=1.0, seed=3),
    "choices": Choices(["{a}", " is", "The"]),
    "hidden": Hidden(),
}
CONTROLS = ["unpatched", "random", "shuffled"]
readouts = pytest.mark.parametrize("readout", READOUTS)


def scope_of(readout, *, source=None, target=None, **options):
    return Patchscope(
        source=Source(**{"prompt": "{s}", "position": [0, -1], "layer": ["embed", 0, 2]} | (source or {})),
        target=Target(**{"prompt": "{t}", "position": ["x", -1], "layer": [2, 3]} | (target or {})),
        readout=READOUTS[readout],
        **options,
    )


def assert_equal_runs(one, other):
    assert [cell for cell, _ in one] == [cell for cell, _ in other]
    for (_, given), (_, expected) in zip(one, other, strict=True):
        hooks.assert_same(given, expected)


@readouts
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_all_contexts_are_one(family, readout, tiny_model, run_cells):
    scope, model = scope_of(readout, target={"position": [0, -1]}), tiny_model(family)
    session = run_cells(scope, model, rows=ROWS, controls=CONTROLS, context="session")
    for context in ("fused", "nested", "bridged"):
        target = None if context == "fused" else tiny_model(family, copy=1)
        other = run_cells(scope, model, target, rows=ROWS, controls=CONTROLS, context=context)
        assert_equal_runs(other, session)


@readouts
@pytest.mark.parametrize("context", ["fused", "session", "bridged"])
def test_the_rehearsal_gives_the_same(context, readout, tiny_model, run_cells):
    """nnsight serialises the request and reads it back; two models behind a backend are always bridged."""
    scope, target = scope_of(readout, target={"position": [0, -1]}), None
    if context == "bridged":
        target = tiny_model(seed=1)
    local = run_cells(scope, tiny_model(), target, rows=ROWS, controls=CONTROLS, context=context)
    remote = run_cells(
        scope, tiny_model(), target, rows=ROWS, controls=CONTROLS, context=context, remote="local"
    )
    assert_equal_runs(remote, local)


@pytest.mark.parametrize("context", ["session", "bridged"])
def test_the_rehearsal_carries_states_between_steps(context, tiny_model, run_cells):
    scope = scope_of("source_reference", target={"position": [0, -1]})
    target = tiny_model(seed=1) if context == "bridged" else None
    local = run_cells(scope, tiny_model(), target, rows=ROWS, context=context)
    options = {"max_rows": 1, "remote": "local"}
    assert_equal_runs(run_cells(scope, tiny_model(), target, rows=ROWS, context=context, **options), local)


@pytest.mark.parametrize("family", ["qwen3", "opt", "gptj"])
@pytest.mark.parametrize("readout", ["source_reference", "generate", "hidden"])
def test_the_rehearsal_on_other_architectures(family, readout, tiny_model, run_cells):
    scope = scope_of(readout, source={"site": "mlp", "layer": [0, 2]}, target={"position": [0, -1]})
    local = run_cells(scope, tiny_model(family), rows=ROWS, controls=CONTROLS)
    remote = run_cells(scope, tiny_model(family), rows=ROWS, controls=CONTROLS, remote="local")
    assert_equal_runs(remote, local)


@pytest.mark.parametrize(
    "mapping",
    [
        pytest.param("target_norm", id="target_norm"),
        pytest.param(Affine(torch.eye(tiny.D_MODEL) * 2, torch.ones(tiny.D_MODEL)), id="affine"),
        pytest.param(torch.nn.LayerNorm(tiny.D_MODEL), id="torch module"),
        pytest.param(Bent(), id="own module"),
        pytest.param(doubled, id="function"),
        pytest.param(lambda states: states + 1, id="lambda"),
    ],
)
@pytest.mark.parametrize("context", ["session", "bridged"])
def test_the_rehearsal_takes_any_mapping(mapping, context, tiny_model, run_cells):
    scope = scope_of("next_token", target={"position": [0, -1]}, mapping=mapping)
    target = tiny_model(seed=1) if context == "bridged" else None
    local = run_cells(scope, tiny_model(), target, rows=ROWS, context=context)
    remote = run_cells(scope, tiny_model(), target, rows=ROWS, context=context, remote="local")
    assert_equal_runs(remote, local)


@pytest.mark.parametrize("context", ["nested", "bridged"])
@pytest.mark.parametrize(("family", "other"), [("llama", "gpt2"), ("opt", "gemma3"), ("gptj", "qwen2")])
def test_two_architectures_of_different_depth(family, other, context, tiny_model, run_cells):
    """Source states of one family in another, whose blocks are more; the reference compares their tokens."""
    for readout in ("source_reference", "generate", "choices"):
        scope = scope_of(readout, source={"position": -1}, target={"position": 0, "layer": ["embed", 1, 5]})
        source, target = tiny_model(family), tiny_model(other, n_layers=6)
        found = run_cells(scope, source, target, rows=ROWS, controls=["unpatched"], context=context)
        pair = hooks.Pair(
            scope,
            tiny.reference(family),
            tiny.reference(other, n_layers=6),
            tokenizer=tiny.TOKENIZER,
            eos=[tiny.EOS_ID],
        )
        for cell, given in found:
            hooks.assert_same(given, pair.expected(cell, ROWS[cell.row]))


@pytest.mark.parametrize("context", ["nested", "bridged"])
def test_an_affine_map_between_two_sizes(context, tiny_model, run_cells):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, tiny.D_MODEL, generator=generator)
    bias = torch.randn(48, generator=generator)
    target, reference = tiny_model("gpt2", d_model=48), tiny.reference("gpt2", d_model=48)
    for readout in ("source_reference", "generate", "hidden"):
        scope = scope_of(readout, target={"position": [0, -1]}, mapping=Affine(weight, bias))
        found = run_cells(scope, tiny_model("llama"), target, rows=ROWS, context=context)
        pair = hooks.Pair(
            scope,
            tiny.reference("llama"),
            reference,
            tokenizer=tiny.TOKENIZER,
            eos=[tiny.EOS_ID],
            f=lambda states, clean: states @ weight.T + bias,
        )
        for cell, given in found:
            hooks.assert_same(given, pair.expected(cell, ROWS[cell.row]))
    with pytest.raises(MappingError, match=r"the source's have 32 .* the target's 48"):
        run_cells(scope_of("hidden", target={"position": [0, -1]}), tiny_model("llama"), target, rows=ROWS)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
def test_prompts_of_one_token_in_a_fused_trace(site, family, tiny_model, run_cells):
    scope = Patchscope(
        source=Source(prompt="x", layer=[0, 1], site=site),
        target=Target(prompt="y", layer=[1, 2], site=site),
        readout=NextToken(reference="source"),
    )
    found = run_cells(scope, tiny_model(family), controls=["unpatched"], context="fused")
    pair = hooks.Pair(scope, tiny.reference(family), tokenizer=tiny.TOKENIZER)
    for cell, given in found:
        hooks.assert_same(given, pair.expected(cell, {}))


@readouts
def test_fused_with_only_the_unpatched_left(readout, tiny_model, run_cells):
    """What a resumed run may ask for."""
    scope = scope_of(readout, target={"position": [0, -1]})
    options = {"rows": ROWS, "controls": ["unpatched"]}
    every = run_cells(scope, tiny_model(), context="session", **options)
    done = [cell.number for cell, _ in every if cell.control != "unpatched"]
    plain = [(cell, given) for cell, given in every if cell.control == "unpatched"]
    assert_equal_runs(run_cells(scope, tiny_model(), done=done, **options), plain)


@readouts
def test_sites_that_a_forward_would_pass_in_the_wrong_order(readout, tiny_model, run_cells):
    """Reads at a block's output and writes at its attention, left by a resumed run: a session does it."""
    scope = scope_of(
        readout,
        source={"layer": [0, 1]},
        target={"layer": [1, 2], "position": [0, -1], "site": "attention"},
    )
    every = run_cells(scope, tiny_model(), rows=ROWS, context="session")
    wanted = {(0, 0, 1), (1, 1, 2)}
    left = [
        (cell, given) for cell, given in every if (cell.row, cell.source_layer, cell.target_layer) in wanted
    ]
    done = {cell.number for cell, _ in every} - {cell.number for cell, _ in left}
    assert len(left) == 2
    assert_equal_runs(run_cells(scope, tiny_model(), rows=ROWS, done=done), left)
