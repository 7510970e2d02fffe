"""Compare runs cell by cell: pair the cells that correspond, and test their differences.

1. Read each run's metrics from its table, as the best over layers if the run asks for it.
2. Pair cells by data row, and by those layers and positions that both runs share and that are needed to tell
   cells apart. A logit lens that writes to one layer and a token identity that writes to each are paired by
   the layer they read.
3. Compare every other run with the first, and every run with its own controls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.analysis.statistics import (
    REAL,
    Paired,
    PairedT,
    best_over,
    cells_of,
    intervals,
    layer_means,
    numbers,
    paired,
    paired_t,
)
from patchscope_nn.errors import InputError
from patchscope_nn.metrics import MetricInfo

#: The name of the common metric of methods whose own metrics have different names.
SCORE = "score"
_PLACES = ("source_layer", "target_layer", "source_position", "target_position")
#: The columns of `Comparison.differences`: the pair, and the statistics that `_difference` returns.
_PAIR = ("first", "first_control", "second", "second_control")
_T_TEST = ("n_layers", "t", "p_t", "p_bonferroni")
_COLUMNS = ("metric", *_PAIR, *Paired._fields, *_T_TEST, "first_unpaired", "second_unpaired")


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run to compare.

    Attributes:
        name: Its name in the comparison.
        table: Its table; the columns of readouts may be missing.
        metrics: The names of its metric columns.
        best: The layers over which the best is taken, as in `statistics.best_over`.
        score: The metric column to compare if the runs have different metrics, or None.
        known: Which way its metrics are better, as in `statistics.best_over`.
        data: A digest of its data rows; if it differs, rows are paired by number and source prompt.
    """

    name: str
    table: pd.DataFrame
    metrics: tuple[str, ...]
    best: tuple[str, ...] = ()
    score: str | None = None
    known: Mapping[str, MetricInfo] | None = None
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of comparing runs.

    Attributes:
        names: The runs, in order; the others are compared with the first.
        metrics: The metrics that at least two runs have, and `score` if it is used.
        means: A line for each run, metric and control, over all layers: run, metric, control, mean, low,
            high, n_rows, n_cells.
        differences: A line for each pair of runs or controls: metric, first, first_control, second,
            second_control. Then the statistics of second - first over the paired cells: mean, low, high,
            n_rows, n_pairs, p (sign-flip permutation over data rows); n_layers, t, p_t, p_bonferroni (the
            paper's paired t over layers). Then first_unpaired and second_unpaired, the numbers of cells that
            have no partner.
        layers: `statistics.layer_means` of each run and metric, with columns run and metric. By source layer,
            averaged over target layers; by target layer if the best was taken over the source layers.
        best: The layers over which the best was taken, by run.
    """

    names: tuple[str, ...]
    metrics: tuple[str, ...]
    means: pd.DataFrame
    differences: pd.DataFrame
    layers: pd.DataFrame
    best: Mapping[str, tuple[str, ...]]

    def between(self) -> pd.DataFrame:
        """Return the differences between runs, without those between a run and its own controls."""
        return self.differences[self.differences["first"] != self.differences["second"]]

    def patched(self, metric: str) -> pd.DataFrame:
        """Return the differences between the patched cells of runs in one metric."""
        between = self.between()
        return between[(between["metric"] == metric) & (between["first_control"] == REAL)]

    def records(self) -> dict[str, Any]:
        """Return the comparison as plain values for JSON: lists of records, with None for missing values."""
        frames = {"means": self.means, "differences": self.differences, "layers": self.layers}
        plain = {name: frame.astype(object).where(frame.notna(), None) for name, frame in frames.items()}
        return {
            "runs": list(self.names),
            "metrics": list(self.metrics),
            "best_over": {name: list(over) for name, over in self.best.items()},
            **{name: frame.to_dict("records") for name, frame in plain.items()},
        }


def compare(runs: Sequence[ComparedRun]) -> Comparison:
    """Compare two or more runs with different names cell by cell.

    Raises:
        InputError: There are fewer than two runs, two share a name, or they share no metric or no cell.
    """
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):  # noqa: PLR2004 (a pair)
        raise InputError(
            f"these runs cannot be compared: {', '.join(names) or 'none'}.",
            hint="Give two or more different runs.",
        )
    # By metric and run name, the cells that have a value of it.
    cells = {metric: _read(runs, metric) for metric in _shared_metrics(runs)}
    n_tests = sum(len(by_run) - 1 for by_run in cells.values())
    lines = [line for metric, by_run in cells.items() for line in _lines(metric, by_run, runs, n_tests)]
    differences = pd.DataFrame(lines, columns=_COLUMNS)
    between = differences["first"] != differences["second"]
    if not (between & (differences["n_pairs"] > 0)).any():
        raise InputError(
            f"no cell of {' or '.join(names[1:])} has a partner in {names[0]}.",
            hint="Compare runs over the same data rows, layers and controls.",
        )
    return Comparison(
        names=tuple(names),
        metrics=tuple(cells),
        means=pd.DataFrame([line for metric, by_run in cells.items() for line in _means(metric, by_run)]),
        differences=differences,
        layers=pd.concat(
            [
                layer_means(_by_source(table), metric="value").assign(run=name, metric=metric)
                for metric, by_run in cells.items()
                for name, table in by_run.items()
            ],
            ignore_index=True,
        ),
        best={run.name: run.best for run in runs},
    )


def _shared_metrics(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the metrics that at least two runs have, and first the score if its column differs by run."""
    metrics = [metric for run in runs for metric in run.metrics]
    shared = [metric for metric in dict.fromkeys(metrics) if metrics.count(metric) > 1]
    scores = [run.score for run in runs]
    if all(scores) and len(set(scores)) > 1:
        shared.insert(0, SCORE)
    if not shared:
        each = "; ".join(f"{run.name}: {', '.join(run.metrics) or 'none'}" for run in runs)
        raise InputError(
            f"these runs share no metric ({each}).",
            hint="Give the recipes a common metric, or name each recipe's own with score: METRIC.",
        )
    return shared


def _read(runs: Sequence[ComparedRun], metric: str) -> dict[str, pd.DataFrame]:
    """Return the cells that have a value of a metric, for each run that has the metric."""
    if metric == SCORE:
        return {run.name: _cells(run, run.score) for run in runs if run.score}
    return {run.name: _cells(run, metric) for run in runs if metric in run.metrics}


def _cells(run: ComparedRun, column: str) -> pd.DataFrame:
    """Return the cells that have a value in a column; positions are texts to match by."""
    table = run.table
    if run.best:
        table = best_over(table, metric=column, over=run.best, known=run.known)
    table = table[np.isfinite(numbers(table[column]))]
    cells = cells_of(table, metric=column)
    for name in ("source_position", "target_position"):
        positions = table[name] if name in table.columns else [None] * len(table)
        cells[name] = [
            str([*tokens]) if isinstance(tokens, list | tuple | np.ndarray) else None for tokens in positions
        ]
    return cells


def _lines(
    metric: str, cells: Mapping[str, pd.DataFrame], runs: Sequence[ComparedRun], n_tests: int
) -> Iterator[list[Any]]:
    """Yield one metric's differences: each run against the first that has it, then against its controls."""
    by_name = {run.name: run for run in runs}
    first, *others = cells
    for other in others:
        same_data = by_name[first].data == by_name[other].data
        pair = [
            cells[name] if same_data else _name_rows(cells[name], by_name[name].table)
            for name in (first, other)
        ]
        for control in _controls(*pair):
            tests = n_tests if control == REAL else 0
            difference = _difference(*(side[side["control"] == control] for side in pair), n_tests=tests)
            yield [metric, first, control, other, control, *difference]
    for name, own in cells.items():
        real = own[own["control"] == REAL]
        for control in _controls(own, own)[1:]:
            difference = _difference(own[own["control"] == control], real, n_tests=0)
            yield [metric, name, control, name, REAL, *difference]


def _controls(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Return the controls that both runs have, after the real cells."""
    both = [name for name in dict.fromkeys(first["control"]) if (second["control"] == name).any()]
    return sorted(both, key=lambda name: name != REAL)


def _name_rows(cells: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Name data rows by number and source prompt, to pair runs over different data."""
    prompts: dict[Any, Any] = {}
    if "source_prompt" in table.columns:
        real = table[table["control"].isna()].drop_duplicates("row")
        prompts = dict(zip(real["row"], real["source_prompt"], strict=True))
    return cells.assign(row=[f"{row} {prompts.get(row)}" for row in cells["row"]])


class _Pairs(NamedTuple):
    """Pairs of cells (row, source_layer, value, value_second), and the number without one on each side."""

    table: pd.DataFrame
    unpaired: tuple[int, int]


def _pair(first: pd.DataFrame, second: pd.DataFrame) -> _Pairs:
    """Pair cells by row, then by each shared layer and position until rows and keys identify a cell."""
    if not (_has_layers(first) and _has_layers(second)):
        return _pair_rows(first, second)
    keys = ["row"]
    for place in _PLACES:
        if place != "source_layer" and not any(side.duplicated(keys).any() for side in (first, second)):
            break
        if set(first[place].dropna()) & set(second[place].dropna()):
            keys.append(place)
    sides = [side.assign(again=side.groupby(keys, dropna=False).cumcount()) for side in (first, second)]
    pairs = sides[0].merge(sides[1], on=[*keys, "again"], suffixes=("", "_second"))
    return _Pairs(pairs, (len(first) - len(pairs), len(second) - len(pairs)))


def _pair_rows(first: pd.DataFrame, second: pd.DataFrame) -> _Pairs:
    """Pair by row alone: a side without layers (unpatched cells) has one value for all cells of a row."""
    sides = [side if _has_layers(side) else _row_means(side) for side in (first, second)]
    pairs = sides[0].merge(sides[1], on="row", suffixes=("", "_second"))
    layers = pairs["source_layer"].fillna(pairs["source_layer_second"])
    missing = [int((~side["row"].isin(pairs["row"])).sum()) for side in (first, second)]
    return _Pairs(pairs.assign(source_layer=layers), (missing[0], missing[1]))


def _has_layers(cells: pd.DataFrame) -> bool:
    return bool(cells[["source_layer", "target_layer"]].notna().any(axis=None))


def _row_means(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.groupby("row", sort=False)["value"].mean().reset_index().assign(source_layer=np.nan)


def _difference(first: pd.DataFrame, second: pd.DataFrame, *, n_tests: int) -> list[Any]:
    """Compute the statistics of second - first, as in `_COLUMNS`; `n_tests` 0 skips the t-test."""
    pairs = _pair(first, second)
    values = pairs.table["value_second"] - pairs.table["value"]
    t_test = PairedT(0, np.nan, np.nan, np.nan)
    if n_tests:
        means = pairs.table.groupby("source_layer")[["value", "value_second"]].mean()
        t_test = paired_t(means["value_second"], means["value"], tests=n_tests)
    return [*paired(values, row=pairs.table["row"]), *t_test, *pairs.unpaired]


def _by_source(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.assign(target_layer=np.nan) if cells["source_layer"].notna().any() else cells


def _means(metric: str, cells: Mapping[str, pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Yield the mean of each run and control over all layers."""
    for name, own in cells.items():
        for control in sorted(set(own["control"]), key=lambda name: (name != REAL, name)):
            part = own[own["control"] == control]
            mean = intervals(part["value"], row=part["row"])._asdict()
            fields = {field: values[0].item() for field, values in mean.items()}
            yield {"run": name, "metric": metric, "control": control, **fields}
