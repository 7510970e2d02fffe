"""Reading the tidy table, from memory or from parquet: its numbers, its metrics and their means by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from patchscope_nn.errors import InputError
from patchscope_nn.tables import PLACES, READINGS

REAL = "patched"  # what a figure calls the cells that are no control
NO_LAYER = -2.0  # where a control that reads no layer stands: left of "embed"
_NO_METRICS = {*PLACES, *(name for names in READINGS.values() for name in names), "error"}
_DRAWS, _SEED = 1000, 0


def is_null(value: object) -> bool:
    """Whether a value stands for nothing: None, NaN or pandas' NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and bool(np.isnan(value)))


def as_list(value: Any) -> list[Any]:
    """A list cell as a list, whether it comes from memory (list) or from parquet (array); null is []."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    if isinstance(value, list | tuple):
        return list(value)
    return [] if is_null(value) else [value]


def numbers(column: pd.Series) -> np.ndarray:
    """A column as floats, NaN where it holds no number."""
    if pd.api.types.is_numeric_dtype(column):
        return np.asarray(column.to_numpy(dtype=float, na_value=np.nan))
    counted = (int, float, np.number, np.bool_)
    return np.array([float(value) if isinstance(value, counted) else np.nan for value in column], dtype=float)


def layer_name(layer: float) -> str:
    """A block's number as text; -1 is "embed", and none at all (NaN or `NO_LAYER`) is "unpatched"."""
    if np.isnan(layer) or layer == NO_LAYER:
        return "unpatched"
    return "embed" if layer == -1 else str(int(layer))


def layer_axis(table: pd.DataFrame) -> str | None:
    """The column that tells layers apart; None when several target layers cross several source layers."""
    source, target = pd.Series(numbers(table["source_layer"])), pd.Series(numbers(table["target_layer"]))
    target = target[source.notna()]
    if source.nunique() == 1 < target.nunique():
        return "target_layer"
    return None if target.groupby(source).nunique().gt(1).any() else "source_layer"


def reads_sink(cell: Any) -> bool:
    """Whether a cell (a mapping by column) reads or writes position 0, the attention sink."""
    if cell.get("control") == "unpatched":
        return False
    return 0 in as_list(cell.get("source_position")) or 0 in as_list(cell.get("target_position"))


def metric_columns(table: pd.DataFrame, *, declared: Iterable[Any] = ()) -> list[str]:
    """The columns that hold a metric: those declared, then the numeric ones that no readout makes.

    Args:
        table: The tidy table.
        declared: A recipe's `metrics`: names, or {name: parameters}. `surprisal` also means `surprisal_nats`.
    """
    names = [name for entry in declared for name in ([entry] if isinstance(entry, str) else entry)]
    wanted = [column for name in names for column in (name, f"{name}_nats")]
    wanted += [str(column) for column in table.columns if column not in _NO_METRICS]
    return [
        column
        for column in dict.fromkeys(wanted)
        if column in table.columns and np.isfinite(numbers(table[column])).any()
    ]


def layer_means(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Mean of a metric for each (control, source layer, target layer), with its 95 % bootstrap interval.

    Data rows are drawn, not cells: cells of one row are not independent.

    Args:
        table: The tidy table.
        metric: A column with numbers; cells without one are left out.

    Returns:
        Columns control ("patched" for the real cells), source_layer, target_layer (both NaN for a
        control that reads no layer), mean, low, high (NaN when there is a single row), n_rows.

    Raises:
        InputError: The table has no such column, or no value in it.
    """
    if metric not in table.columns:
        known = ", ".join(metric_columns(table)) or "none; this table has no metric"
        raise InputError(f"metric={metric!r} is not a column of this table.", hint=f"Use one of: {known}.")
    layer = numbers(table["source_layer"])
    values = {
        "row": table["row"].to_numpy(),
        "control": [REAL if is_null(control) else str(control) for control in table["control"]],
        "source_layer": layer,
        "target_layer": np.where(np.isnan(layer), np.nan, numbers(table["target_layer"])),
        "value": numbers(table[metric]),
    }
    cells = pd.DataFrame(values)
    cells = cells[np.isfinite(cells["value"])]
    if cells.empty:
        raise InputError(f"metric={metric!r} has no value in any cell.", hint="See the column 'error'.")
    groups = cells.groupby(["control", "source_layer", "target_layer"], dropna=False, sort=True)
    means = groups["value"].mean().rename("mean").reset_index()
    return means.assign(**_bootstrap(cells["row"], value=cells["value"], group=groups.ngroup()))


def _bootstrap(row: pd.Series, *, value: pd.Series, group: pd.Series) -> dict[str, np.ndarray]:
    """For each group: 2.5 and 97.5 percentiles of its mean over draws of data rows; its number of rows."""
    code, names = pd.factorize(row)
    shape = (len(names), int(group.max()) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (code, group), value)
    np.add.at(counts, (code, group), 1.0)
    generator = np.random.default_rng(_SEED)
    draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_DRAWS).astype(float)
    totals = draws @ counts
    means = np.divide(draws @ sums, totals, out=np.full_like(totals, np.nan), where=totals > 0)
    n_rows = (counts > 0).sum(axis=0)
    # One row says nothing about its spread.
    low, high = np.where(n_rows > 1, np.nanquantile(means, [0.025, 0.975], axis=0), np.nan)
    return {"low": low, "high": high, "n_rows": n_rows}


def controls_of(means: pd.DataFrame) -> list[str]:
    """The controls of `layer_means`, the real cells first."""
    return sorted(means["control"].unique(), key=lambda name: (name != REAL, name))
