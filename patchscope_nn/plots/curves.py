"""A metric by layer with its controls: a curve, or a heatmap where source and target layers are crossed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from patchscope_nn.plots.style import colour_axis, layer_ticks, metric_title, plotly, style
from patchscope_nn.plots.table import controls_of, layer_axis, layer_means, layer_name
from patchscope_nn.plots.text import escape
from patchscope_nn.statistics import REAL

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LINES = {REAL: ("#2b8cc4", "solid"), "random": ("#e69f00", "dash"), "shuffled": ("#cc79a7", "dot")}
_OTHER_LINES = ("#8a8f98", "dashdot")
_BAND = "rgba(43,140,196,0.22)"


def layer_curve(table: pd.DataFrame, *, metric: str) -> go.Figure:
    """Mean of a metric by source layer with its 95 % bootstrap band, and every control as its own line.

    A control that reads no layer (`unpatched`) is a horizontal line. A single source layer written at
    several target layers is drawn by target layer; several of both are drawn by `layer_pair_heatmap`.

    Args:
        table: The tidy table.
        metric: A column with numbers.

    Raises:
        InputError: The table has no such metric, or plotly is not installed.
    """
    figure = plotly().Figure()
    means = layer_means(table, metric=metric)
    axis = layer_axis(means)
    if axis is None:
        return _pairs(means, metric=metric)
    layers = sorted(means[axis].dropna().unique()) or [0.0]
    for control in controls_of(means):
        own = means[means["control"] == control].sort_values(axis)
        if own[axis].isna().all():
            own = own.loc[own.index.repeat(len(layers))].assign(**{axis: layers})
        figure.add_traces(list(_curve(own, axis=axis, control=control, metric=metric)))
    place = axis.replace("_", " ")
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    title = f"{metric} by {place}, mean over data rows"
    style(figure, title=title, height=400, hovermode="x", legend=legend)
    figure.update_xaxes(title=place, range=[layers[0] - 0.5, layers[-1] + 0.5], **layer_ticks(layers))
    figure.update_yaxes(title=metric_title(metric))
    if means["mean"].between(0, 1).all() and not metric.endswith("_nats"):
        figure.update_yaxes(range=[-0.02, 1.05])
    return figure


def _curve(means: pd.DataFrame, *, axis: str, control: str, metric: str) -> Iterator[go.Scatter]:
    """One line, and for the real cells the band under it."""
    graph = plotly()
    banded = means[means["low"].notna()]
    if control == REAL and not banded.empty:
        yield graph.Scatter(
            x=[*banded[axis], *banded[axis][::-1]],
            y=[*banded["high"], *banded["low"][::-1]],
            fill="toself",
            fillcolor=_BAND,
            line={"width": 0},
            hoverinfo="skip",
            name="95 % interval",
        )
    colour, dash = _LINES.get(control, _OTHER_LINES)
    hover = [
        _hover(mean, f"{control}, layer {layer_name(mean[axis])}: {metric}")
        for mean in means.to_dict("records")
    ]
    yield graph.Scatter(
        x=means[axis].tolist(),
        y=means["mean"].tolist(),
        name=_panel(control),
        mode="lines+markers" if control == REAL or len(means) == 1 else "lines",
        line={"color": colour, "dash": dash, "width": 2.5 if control == REAL else 2},
        marker={"size": 6},
        text=hover,
        hovertemplate="%{text}<extra></extra>",
    )


def _panel(control: str) -> str:
    """What a figure calls a control, escaped."""
    return control if control == REAL else escape(f"{control} (control)")


def _hover(mean: dict[Any, Any], *what: str) -> str:
    """A mean with its interval, after lines that say what it is of."""
    spread = "" if np.isnan(mean["low"]) else f" [{mean['low']:.3g}, {mean['high']:.3g}]"
    return f"{'<br>'.join(map(escape, what))} {mean['mean']:.3g}{spread}, {mean['n_rows']} rows"


def layer_pair_heatmap(table: pd.DataFrame, *, metric: str) -> go.Figure:
    """Mean of a metric for each source layer (across) and target layer (up), one panel for each control.

    Args:
        table: The tidy table of a sweep that crosses source and target layers.
        metric: A column with numbers.

    Raises:
        InputError: The table has no such metric, or plotly is not installed.
    """
    plotly()  # its absence is said before anything is computed
    return _pairs(layer_means(table, metric=metric), metric=metric)


def _pairs(means: pd.DataFrame, *, metric: str) -> go.Figure:
    from plotly.subplots import make_subplots

    layered = means[means["source_layer"].notna()]
    across = means[means["source_layer"].isna()]
    controls = controls_of(layered)
    n_columns = min(len(controls), 2) or 1
    n_lines = -(-len(controls) // n_columns) or 1
    figure = make_subplots(n_lines, n_columns, subplot_titles=list(map(_panel, controls)))
    for index, control in enumerate(controls):
        trace = _pair_trace(layered[layered["control"] == control], metric=metric)
        figure.add_trace(trace, row=index // n_columns + 1, col=index % n_columns + 1)
    aside = "".join(f"; {row.control} (control): {row.mean:.3g}" for row in across.itertuples())
    style(figure, title=f"{metric} by source and target layer{aside}", height=110 + 340 * n_lines)
    for update, which in ((figure.update_xaxes, "source_layer"), (figure.update_yaxes, "target_layer")):
        update(title=which.replace("_", " "), showgrid=False, **layer_ticks(sorted(layered[which].unique())))
    shown = layered["mean"].to_numpy()
    colours = colour_axis(shown, title=metric_title(metric), side="right", thickness=12)
    return figure.update_layout(coloraxis=colours)


def _pair_trace(means: pd.DataFrame, *, metric: str) -> go.Heatmap:
    """The panel of one control."""
    hover = []
    for mean in means.to_dict("records"):
        source, target = layer_name(mean["source_layer"]), layer_name(mean["target_layer"])
        place = f"source layer {source}, target layer {target}"
        hover.append(_hover(mean, mean["control"], place, metric))
    pairs = means.assign(hover=hover).pivot_table(
        values=["mean", "hover"], index="target_layer", columns="source_layer", aggfunc="first"
    )
    return plotly().Heatmap(
        x=pairs["mean"].columns.tolist(),
        y=pairs.index.tolist(),
        z=pairs["mean"].to_numpy(),
        text=pairs["hover"].fillna("").to_numpy(),
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
    )
