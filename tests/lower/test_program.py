"""A program holds plain values only, and its typed description is what is built."""

from __future__ import annotations

import inspect
import pickle
import re
import typing

import pytest
import torch
from engine_check import READOUTS, programs, same

from patchscope_nn.body import program as described
from patchscope_nn.lower import nothing
from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Choices

PLAIN = (int, float, str, bool, type(None), torch.Tensor)


def leaves(value):
    if isinstance(value, dict):
        for name, inner in value.items():
            assert isinstance(name, str | int)
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def keys_of(kind):
    return set(typing.get_type_hints(kind))


@pytest.mark.parametrize("optimisations", [Optimisations(), Optimisations.none()], ids=["on", "off"])
@pytest.mark.parametrize("readout", [*READOUTS, Choices([" Paris", " the city"])], ids=lambda one: one.name)
def test_a_program_is_plain_and_has_the_keys_that_are_documented(readout, optimisations, tiny_model):
    layouts = set()
    for _, program in programs(tiny_model(), readout, optimisations=optimisations):
        functions = [leaf for leaf in leaves(program) if callable(leaf)]
        assert functions == [target["readout"]["read"] for target in program["targets"]]
        assert {type(leaf) for leaf in leaves(program) if not callable(leaf)} <= set(PLAIN)
        assert same(pickle.loads(pickle.dumps(program)), program)  # noqa: S301 (made here)
        assert set(program) == keys_of(described.StepProgram)
        assert set(program["writing"]) == keys_of(described.Writing)
        for source in program["sources"]:
            assert set(source) == keys_of(described.SourceProgram)
            for places in (*source["reads"].values(), source["finals"] or {}):
                assert set(places) in (set(), keys_of(described.Places))
        for target in program["targets"]:
            kind = described.RowsProgram if target["layout"] == "rows" else described.PackedProgram
            layouts.add(target["layout"])
            assert set(target) == keys_of(kind)
            assert set(target["readout"]) == keys_of(described.ReadoutProgram)
            reads = (places for source in program["sources"] for places in source["reads"].values())
            n_states = sum(len(places["rows"]) for places in reads)
            for write in target["writes"].values():
                assert set(write) == keys_of(described.Write)
                assert write["states"].max() < n_states
    assert layouts == {"rows" if optimisations == Optimisations.none() else "packed"}


@pytest.mark.quick
def test_a_step_that_does_nothing_is_a_whole_program():
    assert set(nothing()) == keys_of(described.StepProgram)


@pytest.mark.parametrize("kind", [kind for kind in vars(described).values() if typing.is_typeddict(kind)])
def test_every_key_is_documented(kind):
    """A comment stands above each key, or above the keys that it begins a group of."""
    documented = False
    for line in inspect.getsource(kind).splitlines():
        if line.startswith("    #:"):
            documented = True
        elif re.match(r"    \w+: ", line):
            assert documented, line
