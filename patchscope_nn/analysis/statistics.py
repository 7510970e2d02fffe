"""Statistics over a run's cells: means with intervals, paired tests, and the best over many cells.

Data rows are what is sampled: cells of one row share its prompt and are not independent. So a bootstrap draws
rows with all their cells, and a permutation test flips the signs of whole rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.metrics import MetricInfo, described
from patchscope_nn.spec import STATELESS

REAL = "patched"  # what a table of means calls the cells that are no control
_DRAWS, _SEED, _LEVEL = 1000, 0, 0.95
_FLIPS = 9999
_FLIPS_AT_ONCE = 500


class Intervals(NamedTuple):
    """Means of groups of cells, with their bootstrap intervals; each an array, (group,).

    Attributes:
        mean: The mean over the group's cells.
        low: The lower end of the interval; NaN where a single row has cells in the group.
        high: The upper end.
        n_rows: How many data rows have cells in the group.
        n_cells: How many cells it has.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n_rows: np.ndarray
    n_cells: np.ndarray


def intervals(
    value: Any, *, row: Any, group: Any = None, level: float = _LEVEL, draws: int = _DRAWS, seed: int = _SEED
) -> Intervals:
    """The mean of each group of cells, with its percentile interval over draws of data rows.

    The cluster bootstrap (Efron & Tibshirani 1993, section 8.4): every draw takes as many rows as there are,
    with replacement and each with all its cells, the same rows for every group.

    Args:
        value: A finite number for each cell, (cell,).
        row: The data row of each, (cell,).
        group: The group of each, 0..n_groups-1, (cell,); None is one group.
        level: How much of the draws the interval holds.
        draws: How many draws.
        seed: The seed; the same seed gives the same interval.
    """
    values = np.asarray(value, dtype=float)
    groups = np.zeros(len(values), dtype=int) if group is None else np.asarray(group, dtype=int)
    code, names = pd.factorize(np.asarray(row))
    shape = (len(names), int(groups.max(initial=-1)) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (code, groups), values)
    np.add.at(counts, (code, groups), 1.0)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws).astype(float)
    totals = drawn @ counts
    means = np.divide(drawn @ sums, totals, out=np.full_like(totals, np.nan), where=totals > 0)
    n_rows, n_cells = (counts > 0).sum(axis=0), counts.sum(axis=0)
    ends = [(1 - level) / 2, (1 + level) / 2]
    # One row says nothing about its spread.
    low, high = np.where(n_rows > 1, np.nanquantile(means, ends, axis=0), np.nan)
    return Intervals(sums.sum(axis=0) / n_cells, low, high, n_rows, n_cells.astype(int))


def layer_means(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """The mean of a metric for each control and pair of layers, with its 95 % bootstrap interval.

    Args:
        table: A run's table.
        metric: A column with numbers; cells without one are left out.

    Returns:
        Columns control ("patched" for the real cells), source_layer, target_layer (NaN where a control reads
        no layer), scale (only where there are several), mean, low, high (NaN where there is a single row),
        n_rows, n_cells.
    """
    cells = _cells(table, metric=metric)
    names = ["control", *_places(cells)]
    if cells.empty:
        return pd.DataFrame(columns=[*names, *Intervals._fields])
    groups = cells.groupby(names, dropna=False, sort=True)
    found = intervals(cells["value"], row=cells["row"], group=groups.ngroup())
    return groups.size().reset_index()[names].assign(**found._asdict())


def summarise(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str],
    best: Sequence[str] = (),
    by_source: bool = False,
    known: Mapping[str, MetricInfo] | None = None,
) -> pd.DataFrame:
    """Every metric's means, tidy: a line for each metric, control, pair of layers and scale.

    Args:
        table: A run's table.
        metrics: Names of metric columns.
        best: What the best is taken over first, as in `best_over`.
        by_source: Average over target layers too.
        known: What is known of the metrics, as in `best_over`.

    Returns:
        Columns metric, then those of `layer_means`; layers are nullable integers.
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
    whole = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return whole.reindex(columns=names).astype({"source_layer": "Int64", "target_layer": "Int64"})


def best_over(
    table: pd.DataFrame,
    *,
    metric: str,
    over: Sequence[str],
    known: Mapping[str, MetricInfo] | None = None,
) -> pd.DataFrame:
    """The best of a metric over layers, for the real cells and for every control over the same cells.

    The best over many cells is high even where each is a guess; a control that takes the best over as many
    shows how high (sections 4.2 and 5 report such a best, without its control). A cell counts only where
    the real one and all controls that read a layer have a value.

    Args:
        table: A run's table.
        metric: A column with numbers.
        over: `source_layer`, `target_layer` or both.
        known: Which way each metric is better, as `metrics.described` gives it for a run's manifest; None
            knows the metrics that ship. Of an unknown metric, higher is better.

    Returns:
        Columns row, control (None for the real cells), source_layer, target_layer (NaN where the best was
        taken over them), scale (only where there are several), the metric, and n_best, the number of cells
        it is the best of. A control that reads no layer has its own value.
    """
    cells = _cells(table, metric=metric)
    places = _places(cells)
    # Positions come in the same order for the real cells and each control.
    cells["place"] = cells.groupby(["row", "control", *places], dropna=False).cumcount()
    layered = cells["source_layer"].notna()
    spots = ["row", "place", *places]
    wanted = cells[layered]["control"].nunique()
    together = cells[layered].groupby(spots)["control"].transform("nunique").eq(wanted)
    cells = cells[~layered | together.reindex(cells.index, fill_value=False)]
    cells = cells.assign(**dict.fromkeys(over, np.nan))
    higher = is_higher_better(metric, known)
    groups = cells.groupby(["row", "control", "place", *places], dropna=False, sort=False)["value"]
    found = groups.agg(**{metric: "max" if higher else "min", "n_best": "size"}).reset_index()
    controls = found["control"].astype(object).where(found["control"] != REAL, None)
    return found.assign(control=controls).drop(columns="place")


def is_higher_better(metric: str, known: Mapping[str, MetricInfo] | None = None) -> bool:
    """Whether a higher number of a metric is better; so it is of a metric that is not known."""
    found = (described({}) if known is None else known).get(metric)
    return found is None or found.higher_is_better


def _cells(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """The cells that have a value: row, control, layers and scale as floats, value."""
    cells = pd.DataFrame(
        {
            "row": table["row"].to_numpy(),
            "control": [REAL if is_null(control) else str(control) for control in table["control"]],
            "source_layer": numbers(table["source_layer"]),
            "target_layer": numbers(table["target_layer"]),
            "scale": scales_of(table).to_numpy(),
            "value": numbers(table[metric]),
        }
    )
    return cells[np.isfinite(cells["value"])].reset_index(drop=True)


def _places(cells: pd.DataFrame) -> list[str]:
    """What tells the cells of one row and control apart, for which means are taken."""
    return ["source_layer", "target_layer", *(["scale"] if cells["scale"].notna().any() else [])]


def scales_of(table: pd.DataFrame) -> pd.Series:
    """The scale each cell is written at, where there are several.

    NaN where there are not, and for a control that writes no state: it is beside each scale.
    """
    if "scale" not in table.columns:
        return pd.Series(np.nan, index=table.index)
    found = pd.Series(numbers(table["scale"]), index=table.index).mask(table["control"].isin(STATELESS))
    return found if len(found.dropna().unique()) > 1 else found.mask(found.notna())


class Paired(NamedTuple):
    """The mean difference of pairs of cells.

    Attributes:
        mean: The mean difference.
        low: The lower end of its 95 % bootstrap interval over data rows.
        high: The upper end.
        n_rows: How many data rows have pairs.
        n_pairs: How many pairs there are.
        p: Two-sided p of the sign-flip permutation test over data rows; NaN where there is a single row.
    """

    mean: float
    low: float
    high: float
    n_rows: int
    n_pairs: int
    p: float


def paired(difference: Any, *, row: Any, seed: int = _SEED) -> Paired:
    """The mean of paired differences, its bootstrap interval, and its sign-flip permutation test.

    Under the null hypothesis a row's differences are as likely to have the other sign: all of a row are
    flipped together (Fisher's randomisation test: Good 2005, section 3.2.1). Up to 13 rows every pattern of
    signs is counted, else 9,999 random ones.

    Args:
        difference: The difference of each pair, finite, (pair,).
        row: The data row of each, (pair,).
        seed: The seed of the bootstrap and of the random signs.
    """
    values = np.asarray(difference, dtype=float)
    if not len(values):
        return Paired(np.nan, np.nan, np.nan, 0, 0, np.nan)
    found = intervals(values, row=row, seed=seed)
    code, names = pd.factorize(np.asarray(row))
    sums = np.bincount(code, weights=values, minlength=len(names))
    mean, low, high, n_rows, n_cells = (one[0] for one in found)
    return Paired(float(mean), float(low), float(high), int(n_rows), int(n_cells), _sign_flip(sums, seed))


def _sign_flip(sums: np.ndarray, seed: int) -> float:
    if len(sums) < 2:  # noqa: PLR2004 (one sign can only be flipped to itself)
        return float("nan")
    from scipy.stats import permutation_test

    found = permutation_test(
        (sums,),
        lambda signed, axis: signed.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_FLIPS,
        batch=_FLIPS_AT_ONCE,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


class PairedT(NamedTuple):
    """A paired t-test over layers.

    Attributes:
        n_layers: How many layers were paired.
        t: Student's t; NaN where fewer than two layers differ.
        p: Two-sided p.
        p_bonferroni: p times the number of tests made, at most 1.
    """

    n_layers: int
    t: float
    p: float
    p_bonferroni: float


def paired_t(first: Any, second: Any, *, tests: int = 1) -> PairedT:
    """The paper's test of two methods: paired t over layers, Bonferroni-corrected (section 4.2, table 2).

    Layers of one model are not independent samples, so this is given beside the permutation test over rows,
    for comparison with the paper.

    Args:
        first: One method's mean at each layer, (layer,).
        second: The other's, at the same layers.
        tests: How many tests are made together.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(one) < 2 or np.ptp(one - other) == 0:  # noqa: PLR2004 (a spread needs two)
        return PairedT(len(one), np.nan, np.nan, np.nan)
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are nearly all the same
        t, p = map(float, ttest_rel(one, other))
    return PairedT(len(one), t, p, min(1.0, p * tests))


def is_null(value: object) -> bool:
    """Whether a value stands for nothing: None, NaN or pandas' NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and bool(np.isnan(value)))


def numbers(column: pd.Series) -> np.ndarray:
    """A column as floats, NaN where it holds no number."""
    if pd.api.types.is_numeric_dtype(column):
        return np.asarray(column.to_numpy(dtype=float, na_value=np.nan))
    counted = (int, float, np.number, np.bool_)
    return np.array([float(value) if isinstance(value, counted) else np.nan for value in column], dtype=float)
