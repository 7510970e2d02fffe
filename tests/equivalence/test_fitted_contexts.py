"""Fitted mappings in every context: each state by the map of its own (l, l*), as plain hooks do it."""

from __future__ import annotations

from itertools import product

import fits
import hooks
import pytest
import tiny
import torch

from patchscope_nn import backends
from patchscope_nn.backends.crossing import size, target_half, traffic, weights
from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Generate, Hidden, NextToken
from patchscope_nn.runs.execute import Execution, execute, plan_run
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.spec import Patchscope, Source, Target

ROWS = ({"s": "The Eiffel Tower is in", "t": "Diana is in Paris x ->"}, {"s": "Diana is", "t": "x is"})
LAYERS = [-1, 0, 2]
PAIRS = [(layer, target) for layer in LAYERS for target in (-1, 2, 3)]
READOUTS = {
    "next_token": NextToken(reference="source"),
    "generate": Generate(max_new_tokens=4),
    "hidden": Hidden(),
}
CONTROLS = ["unpatched", "random", "shuffled"]
OPTIMISATIONS = [name for name in Optimisations.__dataclass_fields__]  # noqa: C416 (a dict's keys, as a list)
readouts = pytest.mark.parametrize("readout", READOUTS)


def scope_of(readout, fitted, *, layers=("embed", 0, 2), targets=("embed", 2, 3)):
    return Patchscope(
        source=Source(prompt="{s}", position=[0, -1], layer=list(layers)),
        target=Target(prompt="{t}", position=[0, -1], layer=list(targets)),
        mapping=fitted,
        readout=READOUTS[readout],
    )


def check(found, scope, fitted, source, target=None):
    """Every cell that is no control with random numbers is what the reference says."""
    for cell, given in found:
        if cell.control not in (None, "unpatched"):
            continue
        pair = (cell.source_layer, cell.target_layer)
        f = hooks.identity if cell.control else fits.formula(fitted, pair)
        reference = hooks.Pair(scope, source, target, tokenizer=tiny.TOKENIZER, f=f, eos=[tiny.EOS_ID])
        hooks.assert_same(given, reference.expected(cell, ROWS[cell.row]))


@readouts
@pytest.mark.parametrize("form", ["weight", "up", "scale"])
@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize("context", ["session", "fused", "nested", "bridged"])
def test_every_context_is_plain_hooks(  # noqa: PLR0917 (fixtures)
    context, remote, form, readout, tiny_model, run_cells
):
    if remote and context == "nested":
        pytest.skip("a request names one model")
    fitted = fits.random_fit(PAIRS, form=form)
    options = {"layers": ["embed", 0], "targets": [2, 3]} if context == "fused" else {}
    scope = scope_of(readout, fitted, **options)
    target = tiny_model(seed=1) if context in ("nested", "bridged") else None
    found = run_cells(
        scope, tiny_model(), target, rows=ROWS, controls=CONTROLS, context=context, remote=remote
    )
    other = tiny.reference("llama", seed=1) if target else None
    check(found, scope, fitted, tiny.reference("llama"), other)


@readouts
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt"])
def test_other_architectures(family, readout, tiny_model, run_cells):
    name = tiny_model(family).info.name
    fitted = fits.random_fit(PAIRS, source=fits.space(32, name), target=fits.space(32, name))
    scope = scope_of(readout, fitted)
    check(run_cells(scope, tiny_model(family), rows=ROWS), scope, fitted, tiny.reference(family))


@readouts
@pytest.mark.parametrize("off", [*OPTIMISATIONS, "all"])
def test_every_optimisation_off_is_the_same(off, readout, tiny_model, run_cells):
    fitted = fits.random_fit(PAIRS)
    scope = scope_of(readout, fitted)
    names = OPTIMISATIONS if off == "all" else [off]
    options = {"rows": ROWS, "controls": CONTROLS}
    every = run_cells(scope, tiny_model(), **options)
    slower = run_cells(
        scope, tiny_model(), optimisations=Optimisations(**dict.fromkeys(names, False)), **options
    )
    for (cell, given), (other, expected) in zip(slower, every, strict=True):
        assert cell == other
        hooks.assert_same(given, expected)


WIDTHS = ((32, 48), (48, 32), (32, 32))
MAX_ROWS = (1, 3, None)


def crossings():
    """Each form, pair of widths and size of a pass.

    `make test` runs every size with every form and with every pair of widths, `make test-registry` the rest.
    """
    for form, shift in {"weight": 0, "up": 1, "scale": 0}.items():
        for (place, widths), (number, max_rows) in product(enumerate(WIDTHS), enumerate(MAX_ROWS)):
            if form == "scale" and widths[0] != widths[1]:
                continue  # a scale maps between spaces of one size
            covered = form == "scale" or (place + number + shift) % 3 == 0
            yield pytest.param(form, widths, max_rows, marks=() if covered else pytest.mark.registry)


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize(("form", "widths", "max_rows"), [*crossings()])
def test_between_two_models_the_maps_run_where_fewer_bytes_cross(  # noqa: PLR0917 (fixtures)
    form, widths, max_rows, remote, tiny_model, monkeypatch
):
    sides = [fits.space(width) for width in widths]
    source, target = (tiny_model(seed=seed, d_model=width) for seed, width in enumerate(widths))
    fitted = fits.random_fit(PAIRS, source=sides[0], target=sides[1], form=form, bias=form != "scale")
    scope = scope_of("next_token", fitted)
    given = {"source_model": source, "target_model": target, "data": list(ROWS), "controls": ["shuffled"]}
    prepared = prepare(scope, places=backends.Places.of(remote), **given).only
    execution = Execution(context="bridged", max_rows=max_rows)
    planned = plan_run(prepared, execution)
    crossed = []

    def crossing(program, read):
        half = target_half(program, read)
        finals = half["given_finals"]
        sent = size(half["given"]) + (0 if finals is None else size(finals))
        crossed.append((sent, weights(half["writing"]["weights"]), half["writing"]["mapping"]))
        return half

    monkeypatch.setattr("patchscope_nn.backends.places.target_half", crossing)
    bridged = execute(prepared, execution)
    said = traffic(planned, prepared.mapping)
    assert said.steps == len(crossed)
    assert said.bytes == sum(states + more for states, more, _ in crossed)
    assert said.mapped_here == sum(kind == "identity" for *_, kind in crossed)
    alone = [not (len(step.carried) or len(step.kept)) for step in planned.steps()]
    assert all(alone) == (remote == "local" or max_rows is None)
    if form == "weight":
        # A weight is more bytes than these few states. States that several steps use are mapped there.
        assert said.mapped_here == sum(alone)
    if form == "scale":
        assert said.mapped_here < said.steps or max_rows == 1
    nested = execute(prepare(scope, **given).only, Execution(context="nested"))
    for one, other in zip(bridged.rows, nested.rows, strict=True):
        assert one["top_ids"] == other["top_ids"]
        assert one["surprisal_nats"] == pytest.approx(other["surprisal_nats"], abs=1e-4)


def test_only_the_pairs_of_a_step_travel(tiny_model, monkeypatch):
    fitted = fits.random_fit(PAIRS)
    scope = scope_of("next_token", fitted, layers=[0], targets=[2, 3])
    places = backends.Places.of("local")
    prepared = prepare(scope, places=places, model=tiny_model(), data=list(ROWS)).only
    seen = []
    run = backends.Rehearsal.run

    def looking(self, context, program, **models):
        maps = program["writing"]["weights"]
        written = {
            (layer, written)
            for target in program["targets"]
            for write in target["writes"].values()
            for layer, written in write["pairs"].tolist()
        }
        assert maps.keys() == written
        assert all(isinstance(one, torch.Tensor) for parts in maps.values() for one in parts.values())
        seen.append(set(maps))
        return run(self, context, program, **models)

    monkeypatch.setattr(backends.Rehearsal, "run", looking)
    execute(prepared, Execution(max_rows=1))
    assert set().union(*seen) == {(0, 2), (0, 3)}
    assert len(seen) > 1
