"""Checking that columns and metrics fit a run, and computing them without stopping at errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from patchscope_nn._util.plain import plain, shown
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.metrics.arrays import Arrays, as_rows
from patchscope_nn.metrics.columns import ColumnUse
from patchscope_nn.metrics.registry import MetricUse
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


class Computed:
    """The derived columns and the metrics of `count` cells.

    Attributes:
        values: The values of each column or metric: None for a cell that has none.
        problems: By cell, a sentence for each function that failed.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: dict[str, Any] = {}
        self.problems: dict[int, list[str]] = {}

    def add(self, name: str, call: Callable[[int], Any], *, check: Callable[[Any], Any], noun: str) -> None:
        """Add the values that a user's function returns for each cell; one that fails is None."""
        self.values[name] = [self._value(name, cell, call, check, noun) for cell in range(self.count)]

    def _value(
        self, name: str, cell: int, call: Callable[[int], Any], check: Callable[[Any], Any], noun: str
    ) -> Any:
        try:
            return check(call(cell))
        except Exception as error:  # noqa: BLE001 (a user's function may raise anything; the run goes on)
            problem = f"{noun} {name} failed: {type(error).__name__}: {error}."
            self.problems.setdefault(cell, []).append(problem)
            return None

    def add_numbers(self, name: str, numbers: Any) -> None:
        """Add a metric that is computed at once: NaN where there is none, None for none at all."""
        import numpy as np

        numbers = np.full(self.count, np.nan) if numbers is None else np.asarray(numbers, float)
        if np.isinf(numbers).any():
            self.add(
                name,
                lambda cell: None if np.isnan(numbers[cell]) else numbers[cell],
                check=_number,
                noun="metric",
            )
        else:
            self.values[name] = np.ma.masked_invalid(numbers)


def compute(
    derived: Sequence[ColumnUse],
    uses: Sequence[MetricUse],
    columns: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> Computed:
    """Compute the derived columns and the metrics of some cells.

    Args:
        derived: The derived columns, resolved. Each can read those before it.
        uses: The metrics, resolved.
        columns: The cells' places and what their readout returned, as arrays of pyarrow.
        rows: The data row of each cell.

    Returns:
        Among others, a finite number or None for each metric and cell. What fails is None.
    """
    computed = Computed(len(rows))
    by_cell = [use for use in uses if use.metric is not None and not use.metric.by_column]
    # Functions must not change the values that other functions read or that are written to the table.
    cells = as_rows(columns) if derived or by_cell else []
    read_only = [
        (MappingProxyType(cell), MappingProxyType(row)) for cell, row in zip(cells, rows, strict=False)
    ]

    def call_of(function: Callable[..., Any], **parameters: str) -> Callable[[int], Any]:
        return lambda cell: function(*read_only[cell], **parameters)

    for own in derived:
        if own.column is not None:
            computed.add(own.name, call_of(own.column.compute), check=own.column.check, noun="column")
            for cell, value in zip(cells, computed.values[own.name], strict=True):
                cell[own.name] = value
    for use in uses:
        if use.metric is not None:
            parameters = dict(use.parameters)
            if use.metric.by_column:
                computed.add_numbers(use.name, use.metric.compute(Arrays(columns), rows, **parameters))
            else:
                call = call_of(use.metric.compute, **parameters)
                computed.add(use.name, call, check=_number, noun="metric")
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
