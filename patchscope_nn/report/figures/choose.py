"""Choose the figures that suit a table."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from patchscope_nn.analysis.statistics import best_over, layer_means
from patchscope_nn.metrics import MetricInfo
from patchscope_nn.report.figures.comparison import comparison_curve
from patchscope_nn.report.figures.curves import layer_curve, layer_pair_heatmap
from patchscope_nn.report.figures.drawing import Drawing
from patchscope_nn.report.figures.grid import text_heatmap
from patchscope_nn.report.figures.maps import rows_with_positions, token_heatmap
from patchscope_nn.report.figures.table import layer_axis, metric_columns, with_probe_controls
from patchscope_nn.spec import kinds_in

_TOKEN_HEATMAPS = 3  # one for each of the first data rows


def figures(
    table: pd.DataFrame,
    *,
    metrics: Iterable[Any] = (),
    all_cells: pd.DataFrame | None = None,
    best: Sequence[str] = (),
    known: Mapping[str, MetricInfo] | None = None,
) -> list[tuple[str, Drawing]]:
    """Draw the figures that suit a table: a curve or heatmap for each metric, then the text heatmap.

    Args:
        table: The tidy table.
        metrics: The names of a run's metrics; other numeric columns are drawn after these.
        all_cells: The table for the figures of metrics, if `table` holds only the first cells.
        best: The layers over which the best is taken before a metric is drawn, as in `statistics.best_over`.
        known: Titles and directions of metrics, as `metrics.described` gives them; None: those that ship.

    Returns:
        Pairs of a plain-text title and a figure; empty if no cell has a result.

    Raises:
        InputError: Plotly is not installed.
    """
    scored = with_probe_controls(table if all_cells is None else all_cells)
    names = [name for name in metric_columns(table, declared=metrics) if name in scored.columns]
    drawn = [_metric_figure(scored, metric=name, best=best, known=known) for name in names]
    if best and names and layer_axis(scored) is None:
        drawn.append(layer_pair_heatmap(scored, metric=names[0], known=known))
    rows = rows_with_positions(table)[:_TOKEN_HEATMAPS] if names else []
    drawn += [token_heatmap(table, metric=names[0], row=row, known=known) for row in rows]
    kinds = [kind for kind in kinds_in(table.columns) if kind.says]
    if kinds and table[[kind.says for kind in kinds]].notna().any(axis=None):
        value = None if any(kind.odds for kind in kinds) else next(iter(names), None)
        drawn.append(text_heatmap(table, value=value))
    return [(html.unescape(figure.title), figure) for figure in drawn]


def _metric_figure(
    table: pd.DataFrame, *, metric: str, best: Sequence[str], known: Mapping[str, MetricInfo] | None
) -> Drawing:
    if not best:
        return layer_curve(table, metric=metric, known=known)
    cells = best_over(table, metric=metric, over=best, known=known)
    over = " and ".join(best).replace("_", " ")
    if cells[["source_layer", "target_layer"]].notna().any(axis=None):
        figure = layer_curve(cells, metric=metric, known=known)
        title = f"{figure.title}, best over {over}"
    else:
        means = layer_means(cells, metric=metric).assign(run="", metric=metric)
        figure = comparison_curve(means, metric=metric, names=[""], known=known)
        title = f"{metric}, best over {over}, mean over data rows"
    figure.layout["title"]["text"] = title
    return figure
