"""Comparing runs cell by cell: which cells are the same, their differences, and how sure these are.

1. each run's metrics are read from its table, the best over layers taken where that is asked;
2. cells are paired: by data row, and by as much of layers and positions as both runs share and as tells their
   cells apart (a logit lens writes to one layer and a token identity to each, and both read the same);
3. every other run is compared with the first, and every run with its own controls.
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
    intervals,
    is_null,
    layer_means,
    numbers,
    paired,
    paired_t,
)
from patchscope_nn.errors import InputError
from patchscope_nn.metrics import MetricInfo

#: What the metric is called by which methods are compared whose metrics have different names.
SCORE = "score"
_PLACES = ("source_layer", "target_layer", "source_position", "target_position")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run to compare.

    Attributes:
        name: What the comparison calls it.
        table: Its table; what was read of the cells may be left out.
        metrics: The names of its metric columns.
        best: What the best is taken over, as in `statistics.best_over`.
        score: The metric column that stands for it where runs have different ones; None for none.
        known: Which way its metrics are better, as in `statistics.best_over`.
        data: A digest of its data rows; where two differ, rows are paired by number and source prompt.
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
    """Runs, compared.

    Attributes:
        names: The runs, in order; the first is what the others are compared with.
        metrics: The metrics that at least two runs have, `score` among them.
        means: A line for each run, metric and control: run, metric, control, mean, low, high, n_rows,
            n_cells; over all layers.
        differences: A line for each pair: metric, first, first_control, second, second_control; then of
            second - first over the paired cells mean, low, high, n_rows, n_pairs, p (sign-flip permutation
            over data rows); n_layers, t, p_t, p_bonferroni (the paper's paired t over layers); and
            first_unpaired, second_unpaired, the cells of each that have no partner.
        layers: `statistics.layer_means` of each run and metric by source layer, over all its target layers
            (by target layer where the best was taken over the source layers), with columns run and metric.
        best: For each run what the best was taken over.
    """

    names: tuple[str, ...]
    metrics: tuple[str, ...]
    means: pd.DataFrame
    differences: pd.DataFrame
    layers: pd.DataFrame
    best: Mapping[str, tuple[str, ...]]

    def between(self) -> pd.DataFrame:
        """The differences between runs, and not between a run and its controls."""
        return self.differences[self.differences["first"] != self.differences["second"]]

    def records(self) -> dict[str, Any]:
        """The comparison as JSON holds it: lists of records, null for what there is not."""
        frames = {"means": self.means, "differences": self.differences, "layers": self.layers}
        plain = {name: frame.astype(object).where(frame.notna(), None) for name, frame in frames.items()}
        return {
            "runs": list(self.names),
            "metrics": list(self.metrics),
            "best_over": {name: list(over) for name, over in self.best.items()},
            **{name: frame.to_dict("records") for name, frame in plain.items()},
        }


def compare(runs: Sequence[Compared]) -> Comparison:
    """Compare runs cell by cell.

    Args:
        runs: Two or more, with names of their own.

    Returns:
        The comparison.

    Raises:
        InputError: There are fewer than two, two have one name, they share no metric, or no cell.
    """
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):  # noqa: PLR2004 (a pair)
        raise InputError(
            f"these runs cannot be compared: {', '.join(names) or 'none'}.",
            hint="Give two or more different runs.",
        )
    columns = {metric: _columns(runs, metric) for metric in _shared_metrics(runs)}
    read = {
        metric: {run.name: _read(run, column) for run, column in zip(runs, found, strict=True) if column}
        for metric, found in columns.items()
    }
    n_tests = sum(len(of) - 1 for of in read.values())
    lines = [line for metric, of in read.items() for line in _lines(metric, of, runs, n_tests)]
    differences = pd.DataFrame(lines, columns=["metric", *_ENDS, *_STATISTICS])
    between = differences["first"] != differences["second"]
    if not (between & (differences["n_pairs"] > 0)).any():
        raise InputError(
            f"no cell of {' or '.join(names[1:])} has a partner in {names[0]}.",
            hint="Compare runs over the same data rows, layers and controls.",
        )
    return Comparison(
        names=tuple(names),
        metrics=tuple(read),
        means=pd.DataFrame([line for metric, of in read.items() for line in _means(metric, of)]),
        differences=differences,
        layers=pd.concat(
            [
                layer_means(_by_source(table), metric="value").assign(run=name, metric=metric)
                for metric, of in read.items()
                for name, table in of.items()
            ],
            ignore_index=True,
        ),
        best={run.name: run.best for run in runs},
    )


_ENDS = ("first", "first_control", "second", "second_control")
_STATISTICS = (
    *Paired._fields,
    *("n_layers", "t", "p_t", "p_bonferroni"),
    *("first_unpaired", "second_unpaired"),
)


def _shared_metrics(runs: Sequence[Compared]) -> list[str]:
    """The metrics that at least two runs have, and the score where they have it under different names."""
    counted = [metric for run in runs for metric in run.metrics]
    shared = [metric for metric in dict.fromkeys(counted) if counted.count(metric) > 1]
    scores = [run.score for run in runs]
    if all(scores) and len(set(scores)) > 1:
        shared.insert(0, SCORE)
    if not shared:
        each = "; ".join(f"{run.name}: {', '.join(run.metrics) or 'none'}" for run in runs)
        raise InputError(
            f"these runs share no metric ({each}).",
            hint="Give each recipe a metric in common, or say with score: METRIC what stands for each.",
        )
    return shared


def _columns(runs: Sequence[Compared], metric: str) -> list[str | None]:
    """The column that holds a metric in each run; None where a run has it not."""
    if metric == SCORE:
        return [run.score for run in runs]
    return [metric if metric in run.metrics else None for run in runs]


def _read(run: Compared, column: str) -> pd.DataFrame:
    """A run's cells that have a value of a metric, each place as a number or text that can be compared."""
    table = run.table
    if run.best:
        table = best_over(table, metric=column, over=run.best, known=run.known)
    cells = pd.DataFrame(
        {
            "row": table["row"].to_numpy(),
            "control": [REAL if is_null(control) else str(control) for control in table["control"]],
            "source_layer": numbers(table["source_layer"]),
            "target_layer": numbers(table["target_layer"]),
        }
    )
    for name in ("source_position", "target_position"):
        given = table[name] if name in table.columns else [None] * len(table)
        cells[name] = [
            str([*place]) if isinstance(place, list | tuple | np.ndarray) else None for place in given
        ]
    cells["value"] = numbers(table[column])
    return cells[np.isfinite(cells["value"])].reset_index(drop=True)


def _lines(
    metric: str, of: Mapping[str, pd.DataFrame], runs: Sequence[Compared], n_tests: int
) -> Iterator[list[Any]]:
    """The lines of one metric: every run against the first that has it, then each against its controls."""
    prompts = _RowNames(runs)
    first, *others = of
    for other in others:
        for control in _controls(of[first], of[other]):
            pair = [one[one["control"] == control] for one in (of[first], of[other])]
            named = prompts(first, pair[0], beside=other), prompts(other, pair[1], beside=first)
            tests = n_tests if control == REAL else 0
            yield [metric, first, control, other, control, *_difference(*named, n_tests=tests)]
    for name, cells in of.items():
        for control in _controls(cells, cells)[1:]:
            pair = [cells[cells["control"] == one] for one in (control, REAL)]
            yield [metric, name, control, name, REAL, *_difference(*pair, n_tests=0)]


def _controls(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """The controls that both have, the real cells first."""
    both = [name for name in dict.fromkeys(first["control"]) if (second["control"] == name).any()]
    return sorted(both, key=lambda name: name != REAL)


class _RowNames:
    """Names the data rows of a run so that another's can be found: by number, and with other data by prompt.

    Args:
        runs: The runs.
    """

    def __init__(self, runs: Sequence[Compared]) -> None:
        self._data = {run.name: run.data for run in runs}
        self._prompts = {run.name: _own_prompts(run.table) for run in runs}

    def __call__(self, name: str, cells: pd.DataFrame, *, beside: str) -> pd.DataFrame:
        """The cells of a run, with rows named for a comparison with another."""
        if self._data[name] == self._data[beside]:
            return cells
        prompts = self._prompts[name]
        return cells.assign(row=[f"{row} {prompts.get(row)}" for row in cells["row"]])


def _own_prompts(table: pd.DataFrame) -> dict[Any, Any]:
    """The source prompt of each data row, as its real cells have it."""
    if "source_prompt" not in table.columns:
        return {}
    real = table[[is_null(control) for control in table["control"]]].drop_duplicates("row")
    return dict(zip(real["row"], real["source_prompt"], strict=True))


class _Pairs(NamedTuple):
    """Pairs of cells, and how many of each side have none: row, layer, first and second value of each."""

    table: pd.DataFrame
    unpaired: tuple[int, int]


def _pair(first: pd.DataFrame, second: pd.DataFrame) -> _Pairs:
    """Pair cells by row, and by as many places as both share and as are needed to tell cells apart."""
    if not (_has_layers(first) and _has_layers(second)):
        return _pair_rows(first, second)
    keys = ["row"]
    for place in _PLACES:
        if place != "source_layer" and not any(one.duplicated(keys).any() for one in (first, second)):
            break
        if set(first[place].dropna()) & set(second[place].dropna()):
            keys.append(place)
    sides = [one.assign(again=one.groupby(keys, dropna=False).cumcount()) for one in (first, second)]
    pairs = sides[0].merge(sides[1], on=[*keys, "again"], suffixes=("", "_second"))
    return _Pairs(pairs, (len(first) - len(pairs), len(second) - len(pairs)))


def _pair_rows(first: pd.DataFrame, second: pd.DataFrame) -> _Pairs:
    """Pair by row alone: what has no layers, as an unpatched run, is one value for all cells of its row."""
    sides = [one if _has_layers(one) else _row_means(one) for one in (first, second)]
    pairs = sides[0].merge(sides[1], on="row", suffixes=("", "_second"))
    layers = pairs["source_layer"].fillna(pairs["source_layer_second"])
    missing = [int((~one["row"].isin(set(pairs["row"]))).sum()) for one in (first, second)]
    return _Pairs(pairs.assign(source_layer=layers), (missing[0], missing[1]))


def _has_layers(cells: pd.DataFrame) -> bool:
    return bool(cells[["source_layer", "target_layer"]].notna().any(axis=None))


def _row_means(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.groupby("row", sort=False)["value"].mean().reset_index().assign(source_layer=np.nan)


def _difference(first: pd.DataFrame, second: pd.DataFrame, *, n_tests: int) -> list[Any]:
    """The statistics of second - first, in the order of `_STATISTICS`; `n_tests` 0 leaves the t-test out."""
    pairs = _pair(first, second)
    values = pairs.table["value_second"] - pairs.table["value"]
    found = paired(values, row=pairs.table["row"])
    by_layer = pairs.table.dropna(subset="source_layer").groupby("source_layer")[["value", "value_second"]]
    means = by_layer.mean()
    tested = paired_t(means["value_second"], means["value"], tests=n_tests) if n_tests else _NO_T
    return [*found, *tested, *pairs.unpaired]


_NO_T = PairedT(0, np.nan, np.nan, np.nan)


def _by_source(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.assign(target_layer=np.nan) if cells["source_layer"].notna().any() else cells


def _means(metric: str, of: Mapping[str, pd.DataFrame]) -> Iterator[dict[str, Any]]:
    for name, cells in of.items():
        for control in sorted(set(cells["control"]), key=lambda one: (one != REAL, one)):
            own = cells[cells["control"] == control]
            found = intervals(own["value"], row=own["row"])
            yield {
                "run": name,
                "metric": metric,
                "control": control,
                **{field: values[0].item() for field, values in found._asdict().items()},
            }
