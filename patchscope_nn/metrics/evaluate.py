"""Columns and metrics of a cell: whether they fit a run, and computing them so that no error stops it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from patchscope_nn._util.plain import plain, shown
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.metrics.columns import ColumnUse
from patchscope_nn.metrics.registry import Columns, MetricUse
from patchscope_nn.spec import Readout

_EXAMPLES = {"reference": ", for example reference: source"}


def check_metrics(uses: Sequence[MetricUse], readout: Readout) -> list[str]:
    """Why metrics cannot be computed on a readout; empty where they can.

    Args:
        uses: The metrics; one that is not imported yet is passed over.
        readout: The readout.
    """
    found = []
    for use in uses:
        metric = use.metric
        if metric is None:
            continue
        if metric.readout not in (None, readout.name):
            found.append(f"{use.name} reads {metric.readout}, and the readout is {readout.name}")
        elif metric.needs is not None and not getattr(readout, metric.needs, None):
            how = _EXAMPLES.get(metric.needs, ": true")
            found.append(f"{use.name} needs readout.{readout.name}.{metric.needs}{how}")
    return found


def check_names(
    columns: Sequence[ColumnUse], uses: Sequence[MetricUse], *, taken: Sequence[str]
) -> list[str]:
    """Why the names of users' columns and metrics cannot be columns of a run's table; empty where they can.

    Args:
        columns: The columns that are derived from a readout's.
        uses: The metrics.
        taken: The table's other columns.
    """
    derived = [use.name for use in columns]
    found = [f"column {name!r} has the name of a column of the table" for name in derived if name in taken]
    own = [use.name for use in uses if use.metric is not None and use.metric.digest]
    return found + [
        f"metric {name!r} has the name of a column of the table" for name in own if name in (*taken, *derived)
    ]


def check_columns(uses: Sequence[MetricUse], rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that every data row has the columns the metrics read.

    Raises:
        DataError: A parameter names a column that a row does not have.
    """
    for use in uses:
        for name, column in use.parameters:
            for number, row in enumerate(rows):
                if column not in row:
                    near = did_you_mean(column, list(row))
                    raise DataError(
                        f"metrics.{use.name}.{name}={column!r} is not a column of data row {number}.",
                        hint=f"A metric's parameter names a column of the data. {near} A text that is the "
                        f"same for every row is a column, too: data: {{rows: [{{{name}: {column}}}]}}, and "
                        f"{use.name}: {{{name}: {name}}}.",
                    )


class Computed(NamedTuple):
    """What was computed of one cell.

    Attributes:
        values: The value of each column or metric by name; None where there is none.
        problems: A sentence for each function that failed.
    """

    values: dict[str, Any]
    problems: list[str]


def compute_metrics(uses: Sequence[MetricUse], columns: Columns, row: Mapping[str, Any]) -> Computed:
    """The metrics of one cell.

    Args:
        uses: The metrics, resolved.
        columns: The cell's columns.
        row: Its data row.

    Returns:
        A finite number or None for each metric; the value of one that fails is None.
    """
    calls = {
        use.name: _Call("metric", use.metric.compute, _number, dict(use.parameters))
        for use in uses
        if use.metric is not None
    }
    return _compute(calls, columns, row)


def compute_columns(uses: Sequence[ColumnUse], columns: Columns, row: Mapping[str, Any]) -> Computed:
    """The derived columns of one cell, each of which may read those before it.

    Args:
        uses: The columns, resolved.
        columns: The cell's places, and what its readout gave.
        row: Its data row.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for use in uses:
        if use.column is not None:
            call = _Call("column", use.column.compute, use.column.check, {})
            computed = _compute({use.name: call}, {**columns, **values}, row)
            values |= computed.values
            problems += computed.problems
    return Computed(values, problems)


class _Call(NamedTuple):
    """A user's function, what checks its value, and its parameters."""

    noun: str
    function: Callable[..., Any]
    check: Callable[[Any], Any]
    parameters: Mapping[str, str]


def _compute(calls: Mapping[str, _Call], columns: Columns, row: Mapping[str, Any]) -> Computed:
    # A function may not change what others read, nor what is written.
    read_only = MappingProxyType(dict(columns)), MappingProxyType(dict(row))
    values: dict[str, Any] = dict.fromkeys(calls)
    problems = []
    for name, call in calls.items():
        try:
            values[name] = call.check(call.function(*read_only, **call.parameters))
        except Exception as error:  # noqa: BLE001 (a user's function may raise anything; the run goes on)
            problems.append(f"{call.noun} {name} failed: {type(error).__name__}: {error}.")
    return Computed(values, problems)


def _number(value: Any) -> float | None:
    """A metric's value as a float; a boolean counts as 0 or 1.

    Raises:
        TypeError: It is neither a number nor None.
        ValueError: It is not finite.
    """
    if value is None or (type(value) is float and math.isfinite(value)):
        return value
    number = plain(value)
    if not isinstance(number, int | float):
        raise TypeError(f"it returned {shown(value)}, which is not a number; return a number or None")
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}; return a finite number, or None where there is none")
    return float(number)


#: How many data rows a manifest keeps the reference texts of, and the longest text.
_ROWS, _LIMIT = 24, 1000


def references(uses: Sequence[MetricUse], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The texts that metrics compare with, for the first data rows; a report shows them beside the answers.

    Args:
        uses: The metrics.
        rows: The data rows.

    Returns:
        For each of the first rows the columns that are parameters of a metric; empty where there are none.
    """
    columns = dict.fromkeys(column for use in uses for _, column in use.parameters)
    return [{name: str(row[name])[:_LIMIT] for name in columns} for row in rows[:_ROWS]] if columns else []
