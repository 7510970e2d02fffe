"""Heatmaps of a metric, in panels on one colour scale: what pairs of layers, or tokens and layers, share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.analysis.statistics import REAL, is_null, numbers
from patchscope_nn.metrics import MetricInfo
from patchscope_nn.report.figures.scale import common_scale
from patchscope_nn.report.figures.style import colour_axis, metric_title, panel, plotly, style
from patchscope_nn.report.figures.table import (
    FLAT_LAYERS,
    NO_LAYER,
    as_list,
    controls_of,
    layer_axis,
    layer_name,
)
from patchscope_nn.report.figures.text import escape, shorten

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLUMNS = 2
_PROMPT_WIDTH = 60
_TOKEN_WIDTH = 14
_TICKS = 12  # on half a page
_WIDTH = 760  # of two panels, below which their ticks would meet


class Panel(NamedTuple):
    """A heatmap: its title, escaped, its cells (x, y, mean, hover), and which of them are patched."""

    title: str
    cells: pd.DataFrame
    patched: pd.Series


def heatmaps(
    panels: Sequence[Panel],
    *,
    title: str,
    metric: str,
    known: Mapping[str, MetricInfo] | None = None,
    height: int = 340,
    gap: int = 92,
) -> go.Figure:
    """Panels on one colour scale, two in a line; the axes are the caller's to name.

    Args:
        panels: The panels.
        title: The figure's.
        metric: What the colours say.
        known: What is known of metrics, as in `metric_title`.
        height: Of a panel, pixels.
        gap: Between the lines of panels, pixels: a title and an axis stand there.
    """
    from plotly.subplots import make_subplots

    n_columns = min(len(panels), _COLUMNS) or 1
    n_lines = -(-len(panels) // n_columns) or 1
    whole = 110 + height * n_lines
    figure = make_subplots(
        n_lines, n_columns, subplot_titles=[one.title for one in panels], vertical_spacing=gap / whole
    )
    for index, one in enumerate(panels):
        figure.add_trace(_trace(one.cells), row=index // n_columns + 1, col=index % n_columns + 1)
    style(figure, title=title, height=whole)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    means = pd.concat([one.cells["mean"] for one in panels] or [pd.Series(dtype=float)]).to_numpy()
    patched = pd.concat([one.patched for one in panels] or [pd.Series(dtype=bool)]).to_numpy()
    scale = common_scale(means[patched], means[~patched])
    colours = colour_axis(scale, title=metric_title(metric, known), side="right", thickness=12)
    return figure.update_layout(coloraxis=colours)


def _trace(cells: pd.DataFrame) -> go.Heatmap:
    grid = cells.pivot_table(values=["mean", "hover"], index="y", columns="x", aggfunc="first")
    return plotly().Heatmap(
        x=grid["mean"].columns.tolist(),
        y=grid.index.tolist(),
        z=grid["mean"].to_numpy(),
        text=grid["hover"].fillna("").to_numpy(),
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
    )


def mean_text(mean: dict[Any, Any], *what: str) -> str:
    """A mean with its interval, after lines that say what it is of."""
    spread = "" if np.isnan(mean["low"]) else f" [{mean['low']:.3g}, {mean['high']:.3g}]"
    return f"{'<br>'.join(map(escape, what))} {mean['mean']:.3g}{spread}, {mean['n_rows']} rows"


def rows_with_positions(table: pd.DataFrame) -> list[Any]:
    """The data rows of which several positions were read on their own, in order."""
    real = table[table["source_layer"].notna() & table["control"].isna()]
    spots = pd.Series([tuple(as_list(place)) for place in real["source_position"]], index=real.index)
    counts = spots.groupby(real["row"], sort=False).nunique()
    return [row for row, number in counts.items() if number > 1]


def token_heatmap(
    table: pd.DataFrame, *, metric: str, row: Any, known: Mapping[str, MetricInfo] | None = None
) -> go.Figure:
    """A metric of one data row for each token read (down) and layer (across), one panel for each control.

    Controls that read no layer stand left of the patched cells. Each number is the mean over what else
    varies: samples of the noise, scales, other target layers.

    Args:
        table: The tidy table of a sweep over positions.
        metric: A column with numbers.
        row: The data row.
        known: What is known of metrics, as in `metric_title`.

    Raises:
        InputError: plotly is not installed.
    """
    plotly()
    own = table[table["row"] == row]
    cells = _by_token(own, metric=metric)
    real = own[own["control"].isna() & own["source_layer"].notna()]
    names = dict(zip(cells.loc[real.index, "y"], map(_token_name, real.to_dict("records")), strict=True))
    cells = cells[np.isfinite(cells["mean"]) & cells["y"].isin(list(names))]
    cells = pd.concat([cells, *_repeated(cells, lines=list(names))], ignore_index=True)
    flat = cells["layer"] <= NO_LAYER
    columns = sorted(cells["layer"].unique())
    panels = []
    for control in controls_of(cells[~flat]):
        shown = (cells["control"] == control) | (flat if control == REAL else False)
        means = cells[shown].groupby(["layer", "y"], as_index=False)["mean"].mean()
        hover = [
            f"{panel(control)}, {escape(names[y])}, layer {layer_name(layer)}<br>{escape(metric)} {mean:.3g}"
            for layer, y, mean in zip(means["layer"], means["y"], means["mean"], strict=True)
        ]
        means["x"] = [columns.index(layer) for layer in means["layer"]]
        patched = (means["layer"] > NO_LAYER) & (control == REAL)
        panels.append(Panel(panel(control), means.assign(hover=hover), patched))
    prompt = shorten(real["source_prompt"].iloc[0], width=_PROMPT_WIDTH, tail=True)
    title = f"{metric} by token and layer, row {row}: {prompt}"
    height = 130 + 22 * len(names)
    figure = heatmaps(panels, title=title, metric=metric, known=known, height=height, gap=140)
    axis = (layer_axis(table) or "source_layer").replace("_", " ")
    step = -(-len(columns) // _TICKS)
    ticks = [x for x, layer in enumerate(columns) if layer <= NO_LAYER or x % step == 0]
    figure.update_xaxes(
        title=axis, tickvals=ticks, ticktext=[layer_name(columns[x]) for x in ticks], tickangle=-90
    )
    ends = [max(names, default=0) + 0.5, -0.5]
    figure.update_yaxes(
        tickvals=list(names), ticktext=list(map(escape, names.values())), range=ends, title="token read"
    )
    if len(panels) > 1:
        figure.update_layout(width=_WIDTH)
        # The panel on the left has the same tokens; long names would run into it.
        figure.update_yaxes(title="", showticklabels=False, col=_COLUMNS)
    return figure


def _repeated(cells: pd.DataFrame, *, lines: Sequence[int]) -> Iterator[pd.DataFrame]:
    """Of a control that reads no layer and has one cell, that cell in every other line."""
    for _, own in cells[cells["layer"] <= NO_LAYER].groupby("control"):
        if set(own["y"]) == {0}:
            yield from (own.assign(y=line) for line in lines if line)


def _token_name(cell: dict[Any, Any]) -> str:
    words = " ".join(str(text).strip() for text in as_list(cell["source_token"]))
    return f"{shorten(words, width=_TOKEN_WIDTH)} ({', '.join(map(str, as_list(cell['source_position'])))})"


def _by_token(own: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Cells of one data row: control, layer, y (the number of its token among those read), and the mean.

    Positions come in the same order for the real cells and for each control.
    """
    layers = numbers(own[layer_axis(own) or "source_layer"])
    cells = own.assign(
        control=[REAL if is_null(control) else str(control) for control in own["control"]],
        layer=layers,
        mean=numbers(own[metric]),
    )
    apart = [name for name in ("scale", "sample") if name in own.columns]
    layered = [*apart, "control", "source_layer", "target_layer", "target_prompt"]
    cells["y"] = cells.groupby(layered, dropna=False, sort=False).cumcount()
    flat = cells["source_layer"].isna()
    cells.loc[flat, "y"] = cells[flat].groupby([*apart, "control"], dropna=False, sort=False).cumcount()
    cells.loc[flat, "layer"] = [FLAT_LAYERS.get(control, NO_LAYER) for control in cells.loc[flat, "control"]]
    return cells[["control", "layer", "y", "mean"]]
