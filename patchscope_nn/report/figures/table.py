"""Read a run's table, from memory or from parquet: its layers, its metrics and their means by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from patchscope_nn.analysis import statistics
from patchscope_nn.analysis.statistics import REAL, is_null, numbers
from patchscope_nn.analysis.tables import PLACES
from patchscope_nn.errors import InputError
from patchscope_nn.spec import readout_kinds

NO_LAYER = -2.0  # the place on a layer axis, left of "embed", of a control that reads no layer
#: The place of each control that reads no layer.
FLAT_LAYERS = {"unpatched": NO_LAYER, "text-only": -3.0}


def as_list(value: Any) -> list[Any]:
    """Return a list column's value as a list: it is a list in memory, an array from parquet, or null ([])."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return [] if is_null(value) else [value]


def coded(values: Sequence[Any] | pd.Series) -> tuple[np.ndarray, list[Any]]:
    """Return the number of each value among the distinct ones, (cell,), and the distinct ones.

    A page's texts are made of distinct values, since prompts and tokens repeat from cell to cell. Lists may
    be among the values, and are compared once for each object: in a run's own tables, equal ones are one.
    """
    if isinstance(values, pd.Series) and values.dtype != object:
        codes, index = pd.factorize(values, use_na_sentinel=False)
        return codes, list(index)
    values = list(values)
    if set(map(type, values)) == {str}:
        codes, texts = pd.factorize(np.array(values, object))
        return codes, list(texts)
    codes, addresses = pd.factorize(np.fromiter(map(id, values), np.int64, len(values)))
    first = np.full(len(addresses), len(values))
    np.minimum.at(first, codes, np.arange(len(values)))
    known: dict[Any, int] = {}
    distinct: list[Any] = []
    numbers = np.zeros(len(addresses), np.int64)
    for at, value in enumerate(values[index] for index in first.tolist()):
        numbers[at] = known.setdefault(_key(value), len(known))
        if len(distinct) < len(known):
            distinct.append(value)
    return numbers[codes], distinct


def _key(value: Any) -> Any:
    """Return what is equal exactly for values that a page shows alike."""
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(map(_key, as_list(value)))
    return None if is_null(value) else (type(value), value)


def layer_name(layer: float) -> str:
    """Return a layer's name: -1 is "embed", NaN "unpatched", a place in `FLAT_LAYERS` its control."""
    if np.isnan(layer):
        return "unpatched"
    if layer <= NO_LAYER:
        return next(name for name, place in FLAT_LAYERS.items() if place == layer)
    return "embed" if layer == -1 else str(int(layer))


def layer_axis(table: pd.DataFrame) -> str | None:
    """Return the column of layers that varies, or None if source and target layers vary independently."""
    source, target = pd.Series(numbers(table["source_layer"])), pd.Series(numbers(table["target_layer"]))
    if source.isna().all() and target.notna().any():  # the best was taken over the source layers
        return "target_layer"
    target = target[source.notna()]
    if source.nunique() == 1 < target.nunique():
        return "target_layer"
    return None if target.groupby(source).nunique().gt(1).any() else "source_layer"


def axis_title(table: pd.DataFrame) -> str:
    """Return the title of an axis of layers."""
    return (layer_axis(table) or "source_layer").replace("_", " ")


def by_scale(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split a table by scale: {"scale 2": cells}, or {"": table} for one; unpatched cells are in all."""
    scales = statistics.scales_of(table)
    names = {f"scale {scale:g}": scale for scale in sorted(scales.dropna().unique())}
    return {name: table[scales.isna() | (scales == scale)] for name, scale in names.items()} or {"": table}


def with_probe_controls(table: pd.DataFrame) -> pd.DataFrame:
    """Turn the columns of a probe's controls into rows of controls, as a Patchscope's controls are."""
    columns = {"probe_majority_accuracy": "commonest class", "probe_shuffled_accuracy": "shuffled labels"}
    parts = [
        table.assign(control=control, probe_accuracy=table[name])
        for name, control in columns.items()
        if name in table.columns
    ]
    return pd.concat([table, *parts], ignore_index=True).drop(columns=list(columns)) if parts else table


def reads_sink(cell: Any) -> bool:
    """True if a cell (a mapping by column) reads or writes position 0, the attention sink."""
    if cell.get("control") in FLAT_LAYERS:
        return False
    return 0 in as_list(cell.get("source_position")) or 0 in as_list(cell.get("target_position"))


def sinks(table: pd.DataFrame) -> np.ndarray:
    """Return, for each cell of a table, (cell,), what `reads_sink` says of it."""
    at_sink = np.zeros(len(table), bool)
    for name in ("source_position", "target_position"):
        if name in table.columns:
            codes, distinct = coded(table[name])
            at_sink |= np.array([0 in as_list(positions) for positions in distinct], bool)[codes]
    return at_sink & ~table["control"].isin(list(FLAT_LAYERS)).to_numpy()


def metric_columns(table: pd.DataFrame, *, declared: Iterable[str] = ()) -> list[str]:
    """Return the columns that hold a metric: first the declared ones, then other numeric columns."""
    of_readouts = (name for kind in readout_kinds().values() for name in kind.columns)
    no_metrics = {*PLACES, *of_readouts, "error"}
    wanted = [*declared, *(str(column) for column in table.columns if column not in no_metrics)]
    return [
        column
        for column in dict.fromkeys(wanted)
        if column in table.columns and np.isfinite(numbers(table[column])).any()
    ]


def layer_means(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Compute a metric's means by control and layers, as `statistics.layer_means` does.

    Args:
        table: The tidy table.
        metric: A numeric column; cells without a value are left out.

    Raises:
        InputError: The table has no such column, or no value in it.
    """
    if metric not in table.columns:
        known = ", ".join(metric_columns(table))
        hint = f"Use one of: {known}." if known else "This table has no metric."
        raise InputError(f"metric={metric!r} is not a column of this table.", hint=hint)
    means = statistics.layer_means(table, metric=metric)
    if means.empty:
        raise InputError(
            f"metric={metric!r} has no value in any cell.", hint="The column 'error' has the reasons."
        )
    return means


def controls_of(means: pd.DataFrame) -> list[str]:
    """Return the controls in the result of `layer_means`, with the patched cells first."""
    return sorted(means["control"].unique(), key=lambda name: (name != REAL, name))


def lines_of(
    means: pd.DataFrame, *, axis: str, layers: Sequence[float]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the means of each control by layer; a control that reads no layer has its mean at each."""
    for control in controls_of(means):
        own = means[means["control"] == control].sort_values(axis)
        if own[axis].isna().all():
            own = own.loc[own.index.repeat(len(layers))].assign(**{axis: layers})
        yield control, own
