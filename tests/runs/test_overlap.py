"""The second thread: numbers do not depend on it, and nothing is lost when something fails."""

from __future__ import annotations

import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

import patchscope_nn as ps
from patchscope_nn import backends
from patchscope_nn.analysis.tabulate import Tabulator
from patchscope_nn.backends import steps
from patchscope_nn.runs.folder import InMemory
from patchscope_nn.runs.overlap import behind

ROWS = [{"text": text} for text in ("The Eiffel Tower", "the city of Paris", "Diana is in Paris", "The city")]
OFF = ps.Optimisations(overlap=False)


def run(model, **options):
    scope = ps.Patchscope(
        source=ps.Source(prompt="{text}"),
        target=ps.Target(prompt="The city -> "),
        readout=ps.NextToken(top_k=3, reference="source"),
    )
    given = {"data": ROWS, "controls": ["random", "shuffled"], "metrics": ["nll_nats"], "max_rows": 1}
    return ps.run(scope, model=model, report=False, **(given | options))


@pytest.mark.quick
def test_numbers_do_not_depend_on_the_second_thread(tiny_model):
    model = tiny_model()
    pd.testing.assert_frame_equal(run(model).table(), run(model, optimisations=OFF).table())


def test_states_and_prefixes_are_handed_on_to_steps_that_were_prepared_before(tiny_model):
    """Few rows a pass make many steps: later ones use the states and the prefix of earlier ones."""
    scope = ps.Patchscope(
        source=ps.Source(prompt="{text}", layer="all"),
        target=ps.Target(prompt="one two three -> x", layer="all"),
        readout=ps.Generate(max_new_tokens=3),
    )
    options = {"model": tiny_model(), "data": ROWS, "max_rows": 3}
    on, off = (ps.run(scope, optimisations=each, **options).table() for each in (None, OFF))
    pd.testing.assert_frame_equal(on, off)


def of_this_test(_columns, _row):
    return 1.0


def test_steps_run_here_and_the_rest_in_one_other_thread(tiny_model, monkeypatch):
    seen = {"lower": set(), "run": set(), "append": set()}

    def watch(owner, name, key):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            seen[key].add(threading.current_thread().name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watch(steps, "lower", "lower")
    watch(backends.Local, "run", "run")
    watch(InMemory, "append", "append")
    model, here = tiny_model(), threading.current_thread().name
    run(model)
    assert seen["run"] == {here}
    assert seen["lower"] == seen["append"]
    assert len(seen["append"]) == 1
    assert here not in seen["append"]
    assert not [thread for thread in threading.enumerate() if thread.name in seen["append"]]
    for names in seen.values():
        names.clear()
    run(model, optimisations=OFF)
    run(model, metrics=[of_this_test])  # it may run a model
    assert set.union(*seen.values()) == {here}


def failing(monkeypatch, owner, name, *, after):
    """Let a function fail after some calls."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise OSError("no space left on the device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("place", "frame"), [((Tabulator, "table"), "write"), ((steps, "lower"), "following")]
)
def test_an_error_of_the_thread_ends_the_run_with_its_own_traceback(
    tiny_model, tmp_path, monkeypatch, place, frame
):
    model, expected = tiny_model(), run(tiny_model()).table()
    with monkeypatch.context() as patch:
        failing(patch, *place, after=3)
        with pytest.raises(OSError, match="no space left") as raised:
            run(model, out=tmp_path / "run")
    assert frame in [entry.name for entry in traceback.extract_tb(raised.value.__traceback__)]
    assert len(parts_of(tmp_path / "run")) == 3
    pd.testing.assert_frame_equal(run(model, out=tmp_path / "run").table(), expected)


def test_what_a_step_returned_is_kept_when_the_next_one_is_interrupted(tiny_model, tmp_path, monkeypatch):
    model, real, calls = tiny_model(), backends.Local.run, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(backends.Local, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, out=tmp_path / "run")
    assert len(parts_of(tmp_path / "run")) == 3


def test_progress_is_told_here_after_cells_are_stored(tiny_model, tmp_path):
    told, here = [], threading.get_ident()

    def progress(done, total):
        assert threading.get_ident() == here
        assert sum(len(part) for part in parts_of(tmp_path / "run")) >= done
        told.append((done, total))

    n_cells = len(run(tiny_model(), out=tmp_path / "run", progress=progress).rows)
    assert told == sorted(told)
    assert told[-1] == (n_cells, n_cells)


def parts_of(folder: Path):
    return ps.load_run(folder).rows._parts  # a part is what a step has stored


@pytest.mark.parametrize("threaded", [True, False])
def test_calls_are_made_in_order_and_the_begun_one_is_completed(threaded):
    made = []

    def calls():
        for number in range(3):
            yield lambda number=number: made.append(number)
        raise RuntimeError("the step failed")

    with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match="the step failed"):
        list(behind(calls(), thread if threaded else None))
    assert made == [0, 1, 2]
