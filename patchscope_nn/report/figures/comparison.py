"""A metric of several runs: curves by layer, or points if the best was taken over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from patchscope_nn.analysis.statistics import REAL
from patchscope_nn.metrics import MetricInfo
from patchscope_nn.report.figures import style
from patchscope_nn.report.figures.drawing import Drawing, Part
from patchscope_nn.report.figures.maps import hover_text
from patchscope_nn.report.figures.table import controls_of, layer_name, lines_of
from patchscope_nn.report.figures.text import escape

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def comparison_curve(
    layers: pd.DataFrame, *, metric: str, names: Sequence[str], known: Mapping[str, MetricInfo] | None = None
) -> Drawing:
    """Draw the mean of a metric by source layer: a line and band for each run, with its controls dashed.

    If the best was taken over the layers, every mean is a point with its interval. `layers` has the
    `statistics.layer_means` of each run, with columns run and metric; `known` is as in `figures`.

    Raises:
        InputError: Plotly is not installed.
    """
    figure = Drawing()
    means = layers[layers["metric"] == metric]
    axis = next((name for name in ("source_layer", "target_layer") if means[name].notna().any()), None)
    place = "best over layers" if axis is None else f"by {axis.replace('_', ' ')}"
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    style.apply(figure, title=f"{metric} {place}", height=440, legend=legend)
    if axis is None:
        figure.add(*_points(means, metric=metric, names=names))
        figure.axes("x", tickvals=list(range(len(names))), ticktext=list(map(escape, names)))
        figure.axes("x", range=[-0.5, len(names) - 0.5])
    else:
        ticks = sorted(means[axis].dropna().unique())
        for index, name in enumerate(names):
            own = means[means["run"] == name]
            figure.add(*_curves(own, axis=axis, ticks=ticks, index=index, metric=metric))
        figure.axes("x", title=axis.replace("_", " "), **style.layer_ticks(ticks))
        figure.axes("x", range=[ticks[0] - 0.5, ticks[-1] + 0.5])
    figure.axes("y", title=style.metric_title(metric, known), **style.metric_range(means, metric))
    return figure


def _curves(
    means: pd.DataFrame, *, axis: str, ticks: Sequence[float], index: int, metric: str
) -> Iterator[Part]:
    """Yield the lines of one run, with the interval of the patched cells as a band under them."""
    colour, symbol = style.COLOURS[index % len(style.COLOURS)], _SYMBOLS[index % len(_SYMBOLS)]
    for control, own in lines_of(means, axis=axis, layers=ticks):
        name = str(own["run"].iloc[0])
        if control == REAL and own["low"].notna().any():
            yield style.band(own, axis, colour=colour, opacity=0.16, showlegend=False)
        dash, width = style.line_of(control)[1], 2.5 if control == REAL else 1.5
        yield {
            "type": "scatter",
            "x": own[axis].tolist(),
            "y": own["mean"].tolist(),
            "name": escape(name if control == REAL else f"{name}: {control} (control)"),
            "mode": "lines+markers" if control == REAL else "lines",
            "line": {"color": colour, "dash": dash, "width": width},
            "marker": {"size": 7, "symbol": symbol},
            "text": _hovers(own, metric=metric, axis=axis),
            "hovertemplate": "%{text}<extra></extra>",
        }


def _points(means: pd.DataFrame, *, metric: str, names: Sequence[str]) -> Iterator[Part]:
    """Yield the means of each control as points, with the runs across and the controls side by side."""
    controls = controls_of(means)
    for number, control in enumerate(controls):
        own = means[means["control"] == control]
        shift = 0.5 * (number - (len(controls) - 1) / 2) / len(controls)
        symbol = _SYMBOLS[number % len(_SYMBOLS)] + ("" if control == REAL else "-open")
        above = (own["high"] - own["mean"]).fillna(0).tolist()
        below = (own["mean"] - own["low"]).fillna(0).tolist()
        yield {
            "type": "scatter",
            "x": [names.index(name) + shift for name in own["run"]],
            "y": own["mean"].tolist(),
            "name": style.panel(control),
            "mode": "markers",
            "marker": {"size": 11, "symbol": symbol, "color": style.line_of(control)[0]},
            "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below},
            "text": _hovers(own, metric=metric),
            "hovertemplate": "%{text}<extra></extra>",
        }


def _hovers(means: pd.DataFrame, *, metric: str, axis: str | None = None) -> list[str]:
    """Return the hover text of each mean: its run, its control and its place on the axis of layers."""
    hovers = []
    for mean in means.to_dict("records"):
        control = "" if mean["control"] == REAL else mean["control"]
        layer = f"layer {layer_name(mean[axis])}" if axis else ""
        hovers.append(hover_text(mean, ", ".join(filter(None, (mean["run"], control, layer))), metric))
    return hovers
