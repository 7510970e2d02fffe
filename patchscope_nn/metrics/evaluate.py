"""Checking that columns and metrics fit a run, and computing them for a cell without stopping at errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from patchscope_nn._util.plain import plain, shown
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.metrics.columns import ColumnUse
from patchscope_nn.metrics.registry import Columns, MetricUse
from patchscope_nn.spec import Readout

_EXAMPLES = {"reference": ", for example reference: source"}


def check_metrics(uses: Sequence[MetricUse], readout: Readout) -> list[str]:
    """List the reasons why metrics cannot be computed on a readout; those not imported yet are skipped."""
    problems = []
    for use in uses:
        metric = use.metric
        if metric is None:
            continue
        if metric.readout not in (None, readout.name):
            problems.append(f"{use.name} reads {metric.readout}, and the readout is {readout.name}")
        elif metric.needs is not None and not getattr(readout, metric.needs, None):
            how = _EXAMPLES.get(metric.needs, ": true")
            problems.append(f"{use.name} needs readout.{readout.name}.{metric.needs}{how}")
    return problems


def check_names(
    columns: Sequence[ColumnUse], uses: Sequence[MetricUse], *, taken: Sequence[str]
) -> list[str]:
    """List users' columns and metrics whose names are `taken` by other columns of a run's table."""
    derived = [use.name for use in columns]
    problems = [f"column {name!r} has the name of a column of the table" for name in derived if name in taken]
    own = [use.name for use in uses if use.metric is not None and use.metric.digest]
    return problems + [
        f"metric {name!r} has the name of a column of the table" for name in own if name in (*taken, *derived)
    ]


def check_columns(uses: Sequence[MetricUse], rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that every data row has the columns that the metrics read; DataError if one is missing."""
    for use in uses:
        for name, column in use.parameters:
            for number, row in enumerate(rows):
                if column not in row:
                    suggestion = did_you_mean(column, list(row))
                    raise DataError(
                        f"metrics.{use.name}.{name}={column!r} is not a column of data row {number}.",
                        hint=f"A metric's parameter names a column of the data. {suggestion} A text that is "
                        "the same for every row must be a column, too: "
                        f"data: {{rows: [{{{name}: {column}}}]}}, and {use.name}: {{{name}: {name}}}.",
                    )


class Computed(NamedTuple):
    """The columns or metrics of one cell by name, and a sentence for each function that failed."""

    values: dict[str, Any]
    problems: list[str]

    def add(self, name: str, call: Callable[[], Any], *, check: Callable[[Any], Any], noun: str) -> None:
        """Add the value that a user's function returns; if the function fails, add None and a problem."""
        self.values[name] = None
        try:
            self.values[name] = check(call())
        except Exception as error:  # noqa: BLE001 (a user's function may raise anything; the run goes on)
            self.problems.append(f"{noun} {name} failed: {type(error).__name__}: {error}.")


def compute_metrics(uses: Sequence[MetricUse], columns: Columns, row: Mapping[str, Any]) -> Computed:
    """Compute the resolved metrics of one cell: a finite number or None each. A failed metric has None."""
    computed = Computed({}, [])
    # Functions must not change the values that other functions read or that are written to the table.
    read_only = MappingProxyType(columns), MappingProxyType(row)
    for use in uses:
        if use.metric is not None:
            call = partial(use.metric.compute, *read_only, **dict(use.parameters))
            computed.add(use.name, call, check=_number, noun="metric")
    return computed


def compute_columns(uses: Sequence[ColumnUse], columns: Columns, row: Mapping[str, Any]) -> Computed:
    """Compute the resolved derived columns of one cell. Each can read the derived columns before it."""
    computed = Computed({}, [])
    for use in uses:
        if use.column is not None:
            read_only = MappingProxyType({**columns, **computed.values}), MappingProxyType(row)
            call = partial(use.column.compute, *read_only)
            computed.add(use.name, call, check=use.column.check, noun="column")
    return computed


def _number(value: Any) -> float | None:
    """Convert a metric's value to a finite float or None; a boolean becomes 0 or 1."""
    if value is None or (type(value) is float and math.isfinite(value)):
        return value
    number = plain(value)
    if not isinstance(number, int | float):
        raise TypeError(f"it returned {shown(value)}, which is not a number; return a number or None")
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}; return a finite number, or None if there is none")
    return float(number)


#: A manifest keeps the reference texts of this many data rows, up to this many characters each.
_MAX_ROWS, _MAX_CHARACTERS = 24, 1000


def references(uses: Sequence[MetricUse], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Collect the columns that are parameters of metrics, for the first data rows; reports show them."""
    columns = dict.fromkeys(column for use in uses for _, column in use.parameters)
    if not columns:
        return []
    return [{name: str(row[name])[:_MAX_CHARACTERS] for name in columns} for row in rows[:_MAX_ROWS]]
