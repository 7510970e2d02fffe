"""Metrics of one cell, as a run computes them for many."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from patchscope_nn.metrics import compute


class Found(NamedTuple):
    values: dict
    problems: list


def compute_metrics(uses, columns, row):
    """The metrics of a cell with these columns and this data row, and what went wrong."""
    arrays = {"number": pa.array([0])} | {name: pa.array([value]) for name, value in columns.items()}
    computed = compute((), uses, arrays, [row])
    values = {name: pa.array(of, from_pandas=True)[0].as_py() for name, of in computed.values.items()}
    return Found(values, computed.problems.get(0, []))
