"""Statistics over a run's cells: means with intervals, paired tests, and the best over many cells.

The sampling unit is the data row, because cells of the same row share a prompt and are not independent. So
the bootstrap resamples rows with all their cells, and the permutation test flips the signs of whole rows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.metrics import MetricInfo, described
from patchscope_nn.spec import STATELESS

REAL = "patched"  # the name, in a table of means, of the cells that are not controls
_DRAWS, _SEED = 1000, 0  # the fixed seed makes intervals and p values reproducible
_ENDS = (0.025, 0.975)  # the quantiles that bound a 95 % interval
_DRAWS_AT_ONCE = 100
#: From this many data rows on, the normal interval is used: it differs from the bootstrap's by less than the
#: bootstrap's own noise, and does not draw each row a thousand times.
_MANY_ROWS = 5000
_NORMAL = 1.959964  # a normal variable is within so many standard deviations with probability 0.95
_FLIPS = 9999
_FLIPS_AT_ONCE = 500
_DIGITS = 6  # single precision has about seven


class Intervals(NamedTuple):
    """Means of groups of cells with 95 % bootstrap intervals; each field is an array, (group,).

    An interval is NaN if the group has cells of one data row only.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n_rows: np.ndarray
    n_cells: np.ndarray


def intervals(value: Any, *, row: Any, group: Any = None, draws: int = _DRAWS) -> Intervals:
    """Compute the mean of each group of cells and its 95 % percentile interval over resampled data rows.

    The cluster bootstrap (Efron & Tibshirani 1993, section 8.4): each draw takes as many rows as the data
    has, with replacement. A row brings all its cells, and all groups use the same draws. For 5,000 rows or
    more, the interval is the normal one with the cluster-robust standard error, the bootstrap's limit.

    Args:
        value: A finite number for each cell, (cell,).
        row: The data row of each cell, (cell,).
        group: The group of each cell, 0..n_groups-1, (cell,); None puts all cells into one group.
        draws: The number of bootstrap draws.
    """
    values = np.asarray(value, dtype=float)
    groups = np.zeros(len(values), dtype=int) if group is None else np.asarray(group, dtype=int)
    code, names = pd.factorize(np.asarray(row))
    shape = (len(names), int(groups.max(initial=-1)) + 1)
    place, size = code * shape[1] + groups, shape[0] * shape[1]
    sums = np.bincount(place, values, size).reshape(shape)
    counts = np.bincount(place, minlength=size).reshape(shape).astype(float)
    n_rows, n_cells = (counts > 0).sum(axis=0), counts.sum(axis=0)
    mean = sums.sum(axis=0) / n_cells
    if len(names) >= _MANY_ROWS:
        spread = _NORMAL * np.sqrt(np.square(sums - mean * counts).sum(axis=0)) / n_cells
        ends = np.stack([mean - spread, mean + spread])
    else:
        ends = _bootstrap_ends(sums, counts, draws=draws)
    # The spread of a single row is unknown.
    low, high = np.where(n_rows > 1, ends, np.nan)
    return Intervals(mean, low, high, n_rows, n_cells.astype(int))


def _bootstrap_ends(sums: np.ndarray, counts: np.ndarray, *, draws: int) -> np.ndarray:
    """Return the ends of the percentile intervals, (2, group), from sums and counts, (row, group)."""
    means = np.full((draws, sums.shape[1]), np.nan)
    for number, times in enumerate(_resampled(len(sums), draws)):
        part = means[number * _DRAWS_AT_ONCE :][: len(times)]
        totals = times.astype(float) @ counts
        np.divide(times.astype(float) @ sums, totals, out=part, where=totals > 0)
    quantile = np.nanquantile if np.isnan(means).any() else np.quantile  # the latter takes all groups at once
    return np.asarray(quantile(means, _ENDS, axis=0))


@functools.lru_cache(maxsize=1)
def _resampled(n_rows: int, draws: int) -> list[np.ndarray]:
    """Return how often each row is drawn in each draw, (draw, row), in parts of a few draws."""
    generator, equal = np.random.default_rng(_SEED), np.full(n_rows, 1 / n_rows)
    sizes = [min(_DRAWS_AT_ONCE, draws - start) for start in range(0, draws, _DRAWS_AT_ONCE)]
    return [generator.multinomial(n_rows, equal, size=size).astype(np.uint16) for size in sizes]


def layer_means(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Compute a metric's mean for each control and pair of layers, with its 95 % bootstrap interval.

    Cells without a value are left out.

    Returns:
        Columns control ("patched" for the real cells), source_layer, target_layer (NaN for a control that
        reads no layer), scale (only if the run has several), mean, low, high (NaN for a single row), n_rows,
        n_cells.
    """
    cells = cells_of(table, metric=metric)
    names = ["control", *_place_columns(cells)]
    if cells.empty:
        return pd.DataFrame(columns=[*names, *Intervals._fields])
    groups = cells.groupby(names, dropna=False)
    means = intervals(cells["value"], row=cells["row"], group=groups.ngroup())
    return groups.size().reset_index()[names].assign(**means._asdict())


def summarise(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str],
    best: Sequence[str] = (),
    by_source: bool = False,
    known: Mapping[str, MetricInfo] | None = None,
) -> pd.DataFrame:
    """Compute the means of all metrics, with a line for each metric, control, pair of layers and scale.

    `best` and `known` are as in `best_over`; `by_source` averages over target layers too.

    Returns:
        The column metric, then the columns of `layer_means`; layers are nullable integers.
    """
    scaled = ["scale"] if scales_of(table).notna().any() else []
    parts = []
    for name in metrics:
        cells = best_over(table, metric=name, over=best, known=known) if best else table
        if by_source and cells["source_layer"].notna().any():
            cells = cells.assign(target_layer=np.nan)
        parts.append(layer_means(cells, metric=name).assign(metric=name))
    parts = [part for part in parts if not part.empty]
    names = ["metric", "control", "source_layer", "target_layer", *scaled, *Intervals._fields]
    means = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return means.reindex(columns=names).astype({"source_layer": "Int64", "target_layer": "Int64"})


def best_over(
    table: pd.DataFrame, *, metric: str, over: Sequence[str], known: Mapping[str, MetricInfo] | None = None
) -> pd.DataFrame:
    """Take the best value of a metric over layers, for the real cells and for each control.

    The best of many guesses is high by chance. How high is shown by a control that takes its best over the
    same number of cells (sections 4.2 and 5 report the best without a control). A cell therefore counts only
    if it has a value for the real cells and for all controls that read a layer.

    Args:
        table: A run's table.
        metric: A numeric column.
        over: `source_layer`, `target_layer` or both.
        known: Which way each metric is better, as `metrics.described` gives it for a run's manifest; None
            knows the metrics that ship. Of an unknown metric, higher is better.

    Returns:
        Columns row, control (None for the real cells), source_layer, target_layer (NaN for the layers in
        `over`), scale (only if the run has several), the metric, and n_best, the number of cells that the
        best was taken over. A control that reads no layer keeps its own value.
    """
    cells = cells_of(table, metric=metric)
    places = _place_columns(cells)
    # Positions come in the same order for the real cells and each control.
    cells["place"] = cells.groupby(["row", "control", *places], dropna=False).cumcount()
    layered = cells["source_layer"].notna()
    n_controls = cells[layered]["control"].nunique()
    in_place = cells[layered].groupby(["row", "place", *places])["control"]
    complete = in_place.transform("nunique").eq(n_controls)
    cells = cells[~layered | complete.reindex(cells.index, fill_value=False)]
    cells = cells.assign(**dict.fromkeys(over, np.nan))
    higher = is_higher_better(metric, known)
    groups = cells.groupby(["row", "control", "place", *places], dropna=False, sort=False)["value"]
    best = groups.agg(**{metric: "max" if higher else "min", "n_best": "size"}).reset_index()
    controls = best["control"].astype(object).where(best["control"] != REAL, None)
    return best.assign(control=controls).drop(columns="place")


def is_higher_better(metric: str, known: Mapping[str, MetricInfo] | None = None) -> bool:
    """Whether a higher number of a metric is better; so it is of a metric that is not known."""
    found = (described({}) if known is None else known).get(metric)
    return found is None or found.higher_is_better


def control_names(table: pd.DataFrame) -> np.ndarray:
    """Return the name of each cell's control, (cell,), `REAL` for the patched cells."""
    codes, names = pd.factorize(table["control"])  # a missing value has the code -1, the last
    return np.array([*map(str, names), REAL], object)[codes]


def cells_of(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Return the cells that have a value: row, control, layers and scale as floats, value."""
    cells = pd.DataFrame(
        {
            "row": table["row"].to_numpy(),
            "control": control_names(table),
            "source_layer": numbers(table["source_layer"]),
            "target_layer": numbers(table["target_layer"]),
            "scale": scales_of(table).to_numpy(),
            "value": numbers(table[metric]),
        }
    )
    known = np.isfinite(cells["value"])
    return cells if known.all() else cells[known].reset_index(drop=True)


def _place_columns(cells: pd.DataFrame) -> list[str]:
    """Return the columns by which means are grouped, within one row and control."""
    return ["source_layer", "target_layer", *(["scale"] if cells["scale"].notna().any() else [])]


def scales_of(table: pd.DataFrame) -> pd.Series:
    """Return the scale at which each cell's state was written, if the run has several scales.

    It is NaN for all cells of a run with one scale, and for a control that writes no state, which belongs to
    every scale.
    """
    if "scale" not in table.columns:
        return pd.Series(np.nan, index=table.index)
    scales = pd.Series(numbers(table["scale"]), index=table.index).mask(table["control"].isin(STATELESS))
    return scales if len(scales.dropna().unique()) > 1 else scales.mask(scales.notna())


class Paired(NamedTuple):
    """The mean difference of pairs of cells, with its 95 % bootstrap interval over data rows.

    p is two-sided, from the sign-flip permutation test over data rows; NaN for a single row.
    """

    mean: float
    low: float
    high: float
    n_rows: int
    n_pairs: int
    p: float


def paired(difference: Any, *, row: Any) -> Paired:
    """Compute the mean of finite paired differences, (pair,), its interval, and a sign-flip permutation test.

    Under the null hypothesis the differences of a row are as likely to have the opposite sign, so the signs
    of a row are flipped together (Fisher's randomisation test: Good 2005, section 3.2.1). All patterns of
    signs are tried for up to 13 rows, and 9,999 random ones for more.
    """
    values = np.asarray(difference, dtype=float)
    if not len(values):
        return Paired(np.nan, np.nan, np.nan, 0, 0, np.nan)
    code, names = pd.factorize(np.asarray(row))
    sums = np.bincount(code, weights=values, minlength=len(names))
    mean, low, high, n_rows, n_pairs = (field[0].item() for field in intervals(values, row=row))
    return Paired(mean, low, high, n_rows, n_pairs, _sign_flip(sums))


def _sign_flip(sums: np.ndarray) -> float:
    """Return the p of the sign-flip test on the sum of each data row, (row,)."""
    if len(sums) < 2:  # noqa: PLR2004 (with one row, both patterns of signs are as extreme)
        return float("nan")
    from scipy.stats import permutation_test

    # Patterns of signs that are equally extreme must not be told apart by rounding.
    scale = np.abs(sums).sum() or 1.0
    result = permutation_test(
        (sums,),
        lambda signed, axis: (signed.sum(axis=axis) / scale).round(_DIGITS),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_FLIPS,
        batch=_FLIPS_AT_ONCE,
        rng=np.random.default_rng(_SEED),
    )
    return float(result.pvalue)


class PairedT(NamedTuple):
    """A paired t-test over layers, two-sided.

    t is NaN with fewer than two layers, or if all differences are equal. p_bonferroni is p times the number
    of tests, at most 1.
    """

    n_layers: int
    t: float
    p: float
    p_bonferroni: float


def paired_t(first: Any, second: Any, *, tests: int = 1) -> PairedT:
    """Compare two methods' means at the same layers, (layer,), by the paper's test.

    Paired t over layers, with Bonferroni's correction for `tests` tests (section 4.2 and table 2). The layers
    of a model are not independent samples. The permutation test over rows is the one to trust; this one is
    reported beside it for comparison with the paper.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(a) < 2 or np.ptp(a - b) == 0:  # noqa: PLR2004 (a spread needs two)
        return PairedT(len(a), np.nan, np.nan, np.nan)
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # raised if the differences are nearly equal
        t, p = map(float, ttest_rel(a, b))
    return PairedT(len(a), t, p, min(1.0, p * tests))


def mean_text(mean: Mapping[Any, Any] | None, spec: str = ".3g") -> str:
    """Write a mean as `0.5 [0.4, 0.6]`, without the interval if it is missing; empty for no mean."""
    if mean is None or is_null(mean["mean"]):
        return ""
    spread = "" if is_null(mean["low"]) else f" [{mean['low']:{spec}}, {mean['high']:{spec}}]"
    return f"{mean['mean']:{spec}}{spread}"


def is_null(value: object) -> bool:
    """True for None, NaN and pandas' NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and bool(np.isnan(value)))


def numbers(column: pd.Series) -> np.ndarray:
    """Return a column as floats, with NaN for every value that is not a number."""
    if pd.api.types.is_numeric_dtype(column):
        return np.asarray(column.to_numpy(dtype=float, na_value=np.nan))
    numeric = (int, float, np.number, np.bool_)
    return np.array([float(value) if isinstance(value, numeric) else np.nan for value in column], dtype=float)
