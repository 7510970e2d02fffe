"""Hearing of a run while it runs: what is heard is what comes out, and hearing can end it."""

from collections import defaultdict

import pytest

import patchscope_nn as ps
from patchscope_nn.backends import Places
from patchscope_nn.readouts.generate import cut
from patchscope_nn.runs.execute import Execution, execute
from patchscope_nn.runs.prepare import prepare

ROWS = ({"text": "The Eiffel Tower"}, {"text": "Diana is in the city of"}, {"text": "The Eiffel Tower"})


class Ear:
    """Keeps what it hears; raises after `most` tokens of one cell."""

    def __init__(self, *, most=None):
        self.most, self.n_read = most, 0
        self.heard = defaultdict(list)

    def read(self, count):
        self.n_read += count

    def decoded(self, cell, ids):
        assert len(ids) == len(self.heard[cell]) + 1
        self.heard[cell] = list(ids)
        if len(ids) == self.most:
            raise KeyboardInterrupt


def generating(model, *, places=None, **options):
    scope = ps.Patchscope(
        source=ps.Source(prompt="{text}", layer=[0, 2]),
        target=ps.Target(prompt="The city is x", position=-1),
        readout=ps.Generate(max_new_tokens=6, stop="e", **options),
    )
    return prepare(scope, places=places, model=model, data=ROWS, controls=("unpatched", "random")).only


@pytest.mark.quick
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_rows", [None, 2])
def test_what_is_heard_is_the_text_that_comes_out(tiny_model, family, max_rows):
    prepared, ear = generating(tiny_model(family)), Ear()
    run = execute(prepared, Execution(listener=ear, max_rows=max_rows))
    tokenizer = prepared.target.tokenizer
    heard = [cut(tokenizer.decode(ear.heard[number]), "e") for number in range(len(run.rows))]
    assert heard == [row["text"] for row in run.rows]
    assert any(heard)
    assert ear.n_read == len(run.rows)  # those that another row's cell ran for as well
    assert list(run.rows) == list(execute(prepared, Execution()).rows)


def test_passes_are_heard_of_as_they_are_read(tiny_model):
    scope = ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower is in", position={"each": "all"}),
        target=ps.Target(prompt="The city -> ", position=-1),
    )
    prepared, ear = prepare(scope, model=tiny_model()).only, Ear()
    calls = []
    ear.read = calls.append
    run = execute(prepared, Execution(listener=ear, max_rows=5))
    assert sum(calls) == len(run.rows)
    assert max(calls) <= 5


def test_what_a_listener_raises_ends_the_run_and_spoils_nothing(tiny_model):
    prepared = generating(tiny_model())
    expected = list(execute(prepared, Execution()).rows)
    with pytest.raises(KeyboardInterrupt):
        execute(prepared, Execution(listener=Ear(most=2)))
    assert list(execute(prepared, Execution()).rows) == expected


def test_nothing_is_heard_from_another_process(tiny_model):
    prepared, ear = generating(tiny_model(), places=Places.of("local")), Ear()
    execute(prepared, Execution(listener=ear))
    assert ear.n_read == 0
