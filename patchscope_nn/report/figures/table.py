"""Reading the tidy table, from memory or from parquet: its numbers, its metrics and their means by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from patchscope_nn.analysis import statistics
from patchscope_nn.analysis.statistics import REAL, is_null, numbers
from patchscope_nn.analysis.tables import PLACES
from patchscope_nn.errors import InputError
from patchscope_nn.spec import readout_kinds

NO_LAYER = -2.0  # where a control that reads no layer stands: left of "embed"
#: The same, of each such control.
FLAT_LAYERS = {"unpatched": NO_LAYER, "text-only": -3.0}


def as_list(value: Any) -> list[Any]:
    """A list cell as a list, whether it comes from memory (list) or from parquet (array); null is []."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    if isinstance(value, list | tuple):
        return list(value)
    return [] if is_null(value) else [value]


def layer_name(layer: float) -> str:
    """A block's number as text; -1 is "embed", none (NaN) "unpatched", `FLAT_LAYERS` their controls."""
    if np.isnan(layer):
        return "unpatched"
    if layer <= NO_LAYER:
        return next(name for name, place in FLAT_LAYERS.items() if place == layer)
    return "embed" if layer == -1 else str(int(layer))


def layer_axis(table: pd.DataFrame) -> str | None:
    """The column that tells layers apart; None when several target layers cross several source layers."""
    source, target = pd.Series(numbers(table["source_layer"])), pd.Series(numbers(table["target_layer"]))
    if source.isna().all() and target.notna().any():  # the best over the source layers
        return "target_layer"
    target = target[source.notna()]
    if source.nunique() == 1 < target.nunique():
        return "target_layer"
    return None if target.groupby(source).nunique().gt(1).any() else "source_layer"


def by_scale(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells of each scale, by its name; all under "" where there is one. Unpatched cells are of each."""
    scales = statistics.scales_of(table)
    found = sorted(scales.dropna().unique())
    return {f"scale {scale:g}": table[scales.isna() | (scales == scale)] for scale in found} or {"": table}


def with_probe_controls(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose probe's controls are controls of `probe_accuracy`, as those of a Patchscope are."""
    columns = {
        "probe_majority_accuracy": "commonest class",
        "probe_shuffled_accuracy": "shuffled labels",
    }
    parts = [
        table.assign(control=control, probe_accuracy=table[name])
        for name, control in columns.items()
        if name in table.columns
    ]
    return pd.concat([table, *parts], ignore_index=True).drop(columns=list(columns)) if parts else table


def reads_sink(cell: Any) -> bool:
    """Whether a cell (a mapping by column) reads or writes position 0, the attention sink."""
    if cell.get("control") in FLAT_LAYERS:
        return False
    return 0 in as_list(cell.get("source_position")) or 0 in as_list(cell.get("target_position"))


def metric_columns(table: pd.DataFrame, *, declared: Iterable[str] = ()) -> list[str]:
    """The columns that hold a metric: those declared, then the numeric ones that no readout makes.

    Args:
        table: The tidy table.
        declared: The names of a run's metrics.
    """
    of_readouts = (name for kind in readout_kinds().values() for name in kind.columns)
    no_metrics = {*PLACES, *of_readouts, "error"}
    wanted = [*declared, *(str(column) for column in table.columns if column not in no_metrics)]
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
        control that reads no layer), mean, low, high (NaN when there is a single row), n_rows, n_cells.

    Raises:
        InputError: The table has no such column, or no value in it.
    """
    if metric not in table.columns:
        known = ", ".join(metric_columns(table)) or "none; this table has no metric"
        raise InputError(f"metric={metric!r} is not a column of this table.", hint=f"Use one of: {known}.")
    means = statistics.layer_means(table, metric=metric)
    if means.empty:
        raise InputError(f"metric={metric!r} has no value in any cell.", hint="See the column 'error'.")
    return means


def controls_of(means: pd.DataFrame) -> list[str]:
    """The controls of `layer_means`, the real cells first."""
    return sorted(means["control"].unique(), key=lambda name: (name != REAL, name))
