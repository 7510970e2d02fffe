"""Which figures fit a table."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from patchscope_nn.analysis.statistics import best_over, layer_means
from patchscope_nn.metrics import MetricInfo
from patchscope_nn.report.figures.comparison import comparison_curve
from patchscope_nn.report.figures.curves import layer_curve, layer_pair_heatmap
from patchscope_nn.report.figures.grid import text_heatmap
from patchscope_nn.report.figures.maps import rows_with_positions, token_heatmap
from patchscope_nn.report.figures.table import layer_axis, metric_columns, with_probe_controls
from patchscope_nn.spec import kinds_in

if TYPE_CHECKING:
    import plotly.graph_objects as go


#: The data rows whose tokens are drawn on their own.
_ROWS = 3


def figures(
    table: pd.DataFrame,
    *,
    metrics: Iterable[Any] = (),
    whole: pd.DataFrame | None = None,
    best: Sequence[str] = (),
    known: Mapping[str, MetricInfo] | None = None,
) -> list[tuple[str, go.Figure]]:
    """The figures that fit this table: a curve or heatmap for each metric, then what each state says.

    Args:
        table: The tidy table.
        metrics: The names of a run's metrics; other columns of numbers are drawn after these.
        whole: The table of all cells, for the metrics' figures, where `table` holds only some.
        best: What the best is taken over before a metric is drawn, as in `statistics.best_over`.
        known: The metrics' titles and directions, as `metrics.described` gives them; None knows those that
            ship.

    Returns:
        Pairs of a plain-text title and a figure; empty when no cell has a result.

    Raises:
        InputError: Plotly is not installed.
    """
    every = with_probe_controls(table if whole is None else whole)
    names = [name for name in metric_columns(table, declared=metrics) if name in every.columns]
    drawn = [_of_metric(every, metric=name, best=best, known=known) for name in names]
    if best and names and layer_axis(every) is None:
        drawn.append(layer_pair_heatmap(every, metric=names[0], known=known))
    drawn += [
        token_heatmap(table, metric=names[0], row=row, known=known)
        for row in rows_with_positions(table)[:_ROWS]
        if names
    ]
    kinds = [kind for kind in kinds_in(table.columns) if kind.says]
    if kinds and table[[kind.says for kind in kinds]].notna().any(axis=None):
        value = None if any(kind.odds for kind in kinds) else next(iter(names), None)
        drawn.append(text_heatmap(table, value=value))
    return [(html.unescape(figure.layout.title.text), figure) for figure in drawn]


def _of_metric(
    table: pd.DataFrame, *, metric: str, best: Sequence[str], known: Mapping[str, MetricInfo] | None
) -> go.Figure:
    if not best:
        return layer_curve(table, metric=metric, known=known)
    cells = best_over(table, metric=metric, over=best, known=known)
    over = " and ".join(best).replace("_", " ")
    if cells[["source_layer", "target_layer"]].notna().any(axis=None):
        figure = layer_curve(cells, metric=metric, known=known)
        title = f"{figure.layout.title.text}, best over {over}"
    else:
        means = layer_means(cells, metric=metric).assign(run="", metric=metric)
        figure = comparison_curve(means, metric=metric, names=[""], known=known)
        title = f"{metric}, best over {over}, mean over data rows"
    return figure.update_layout(title_text=title)
