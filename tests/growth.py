"""A small study that tests grow, divide into shards and merge."""

from __future__ import annotations

import pandas as pd

import patchscope_nn as ps

TEXTS = (
    "The Eiffel Tower",
    "the city of Paris",
    "Diana is in Paris",
    "The city",
    "Diana",
    "Paris is the city",
)
ROWS = [{"text": text} for text in TEXTS]


def scope_of(*, layer="all", position=-1, target_layer="same", scale=1.0, **more):
    given = {
        "source": ps.Source(prompt="{text}", layer=layer, position=position),
        "target": ps.Target(prompt="The city -> ", layer=target_layer, scale=scale),
        "readout": ps.NextToken(top_k=3, reference="source"),
    }
    return ps.Patchscope(**(given | more))


def grow(model, *, out=None, scope=None, **more):
    """Run the study, or a variant of it: 6 rows of 9 cells each."""
    given = {"data": ROWS, "controls": ["unpatched", "random"], "metrics": ["precision_at_1", "nll_nats"]}
    return ps.run(scope or scope_of(), model=model, out=out, **({"max_rows": 4} | given | more))


def same(found, expected):
    """Two runs have the same table, row for row: all but numbers exactly, numbers to a rounding error.

    Passes of other sizes round differently, in the last digit or two of single precision.
    """
    pd.testing.assert_frame_equal(found.table(), expected.table(), atol=1e-6, rtol=3e-6)
    if found.path:
        table = pd.read_parquet(found.path / "cells.parquet")
        assert table["row"].tolist() == expected.table()["row"].tolist()
        pd.testing.assert_frame_equal(ps.load_run(found.path).table(), found.table())
    return True


def ran(run):
    """How many cells each session of a run has computed."""
    return [session["cells"] for session in run.manifest["sessions"]]
