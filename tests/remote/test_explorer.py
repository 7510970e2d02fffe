"""The explorer shows of a real server's model what it shows of the model here."""

from __future__ import annotations

import time

import launch
import pytest

from patchscope_nn.explore.answers import Answers
from patchscope_nn.explore.copies import Options
from patchscope_nn.explore.lenses import lenses
from patchscope_nn.explore.views import CellView, GridView
from patchscope_nn.explore.worker import Query, Worker

TINY = launch.TINY
TARGET = {"prompt": "Diana is in Paris in x"}  # the served model reads few tokens


def told(task):
    """All that a request tells its page."""
    events = []
    Query(task, events.append).run()
    assert events[-1]["event"] == "done", events[-1]
    return events


def wait_until(there, *, most_s=120.0):
    end = time.monotonic() + most_s
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def names(model):
    return {"prompt": "Diana is in Paris", "source_model": model, "target_model": model}


def test_a_grid_and_a_description(ndif, folders):
    here, there = Answers(lenses(), Options()), Answers(lenses(), Options(remote=ndif))

    def both(ask):
        return told(lambda one: ask(here, folders[TINY], one)), told(lambda one: ask(there, TINY, one))

    local, remote = both(lambda answers, model, one: answers.grid(GridView(**names(model)), one))
    (shown,), (expected,) = ([one for one in events if one["event"] == "grid"] for events in (remote, local))
    for cell, other in zip(shown.pop("cells"), expected.pop("cells"), strict=True):
        for name in ("top_probs", "entropy_nats", "surprisal_nats"):
            assert cell.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        assert cell == other
    assert shown == expected
    assert any(one["event"] == "notice" and one["line"].startswith("jobs: ") for one in remote)

    view = {"position": 2, "layer": 1, "target": TARGET, "max_new_tokens": 5}
    local, remote = both(lambda answers, model, one: answers.cell(CellView(**names(model), **view), one))
    said, expected = ([one for one in events if one["event"] == "answer"] for events in (remote, local))
    assert len(said) == 3
    assert said == expected


def test_a_cancelled_request_does_not_wait_for_its_job(ndif):
    answers, worker, events = Answers(lenses(), Options(remote=ndif)), Worker(), []
    view = CellView(**names(TINY), position=2, layer=1, target=TARGET, max_new_tokens=40)
    first = Query(lambda query: answers.cell(view, query), events.append)
    worker.submit(first)
    wait_until(lambda: any(one["event"] == "notice" for one in events))
    worker.cancel(first)
    again = []
    worker.submit(Query(lambda query: answers.grid(GridView(**names(TINY)), query), again.append))
    wait_until(lambda: again and again[-1]["event"] == "done")
    assert worker.stop()
    assert not any(one["event"] in ("answer", "done") for one in events)
