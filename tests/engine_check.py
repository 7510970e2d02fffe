"""What every engine has to do. A test of an engine calls `check_engine` with a model that it runs."""

from __future__ import annotations

import copy
from typing import get_args

import hooks
import torch

from patchscope_nn.engines import engine_of
from patchscope_nn.lower import lower
from patchscope_nn.mappings import resolve_mapping
from patchscope_nn.models import Feature
from patchscope_nn.plan import Optimisations, plan
from patchscope_nn.readouts import Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import expand

ROWS = (
    {"s": "The Eiffel Tower is in", "t": "The city of x is"},
    {"s": "Diana of Paris", "t": "city of x is in"},
)
READOUTS = (NextToken(top_k=3), Generate(max_new_tokens=3), Hidden())


def scope_of(readout):
    return Patchscope(
        source=Source(prompt="{s}", position=-1, layer=[0, 2]),
        target=Target(prompt="{t}", position="x", layer=[1, 3]),
        readout=readout,
    )


def check_engine(model, reference, run_cells, *, tokenizer, eos, tolerance=1e-4):
    """Check the engine of a model.

    Args:
        model: A loaded model of at least four blocks.
        reference: `hooks.Reference` of the same weights.
        run_cells: The fixture.
        tokenizer: The model's.
        eos: The ids that end a text.
        tolerance: The largest difference of a number.
    """
    engine = engine_of(model)
    assert engine.name == model.info.engine
    for feature in get_args(Feature):
        assert engine.supports(model.info, feature) is model.info.supports(feature)
    for readout in READOUTS:
        scope = scope_of(readout)
        pair = hooks.Pair(scope, reference, tokenizer=tokenizer, eos=eos)
        assert engine.opens("session")
        for optimisations in (Optimisations(), Optimisations.none()):
            options = {"context": "session", "optimisations": optimisations, "controls": ["unpatched"]}
            for cell, given in run_cells(scope, model, rows=ROWS, **options):
                expected = pair.expected(cell, ROWS[cell.row])
                hooks.assert_same(given, expected, tolerance=tolerance)
    _check_program_stays(engine, model)
    _check_hearing(engine, model)


def programs(model, readout, **options):
    """The steps of a sweep, with their programs."""
    planned = plan(
        expand(scope_of(readout), rows=ROWS, source=model, target=model), context="session", **options
    )
    mapping = resolve_mapping("identity", source=model.info, target=model.info)
    for step in planned.steps():
        yield step, lower(planned, step, source=model, target=model, mapping=mapping)


def same(one, other):
    """Whether two nested plain values are equal, tensors included."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _check_program_stays(engine, model):
    """A body reads a program and never changes it, so it can run twice and gives the same."""
    for readout in READOUTS:
        for _, program in programs(model, readout):
            before = copy.deepcopy(program)
            results = [engine.run("session", program, source=model, target=model) for _ in range(2)]
            assert same(program, before)
            assert same(results[0]["passes"], results[1]["passes"])


def _check_hearing(engine, model):
    """Each pass says first that its prompts are read, then which tokens its rows decode."""
    for step, program in programs(model, Generate(max_new_tokens=3)):
        heard = [[] for _ in step.targets]
        hear = [lambda rows, ids, said=said: said.append((rows, ids)) for said in heard]
        engine.run("session", program, source=model, target=model, hear=hear)
        for said, target_pass in zip(heard, step.targets, strict=True):
            assert said[0] == ([], [])
            assert sorted(said[1][0]) == [*range(len(target_pass.cells))]
