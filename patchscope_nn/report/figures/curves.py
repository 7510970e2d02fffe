"""A metric by layer with its controls: curves, or heatmaps of pairs of layers; each scale has a panel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from patchscope_nn.analysis.statistics import REAL
from patchscope_nn.metrics import MetricInfo
from patchscope_nn.report.figures import style
from patchscope_nn.report.figures.drawing import Drawing, Part
from patchscope_nn.report.figures.maps import Panel, heatmaps, hover_text, rows_with_positions
from patchscope_nn.report.figures.table import (
    by_scale,
    controls_of,
    layer_axis,
    layer_means,
    layer_name,
    lines_of,
)
from patchscope_nn.report.figures.text import listed

_PANEL_WIDTH = 330
_LOG = 20  # the axis of ranks is logarithmic if the largest mean exceeds the smallest by this factor


def layer_curve(
    table: pd.DataFrame, *, metric: str, known: Mapping[str, MetricInfo] | None = None
) -> Drawing:
    """Draw the mean of a metric by source layer with its 95 % bootstrap band, and a line for each control.

    A control that reads no layer (`unpatched`) is a horizontal line. If a single source layer is written at
    several target layers, the curve is by target layer; if both vary, `layer_pair_heatmap` is drawn instead.
    Each scale has its own panel, on a shared y axis. `known` is as in `figures`.

    Raises:
        InputError: The table has no such metric, or plotly is not installed.
    """
    means = {name: layer_means(part, metric=metric) for name, part in by_scale(table).items()}
    whole = pd.concat(means.values())
    axis = layer_axis(whole)
    if axis is None:
        return _pairs(means, metric=metric, known=known)
    figure = Drawing(list(means), columns=len(means), shared=True)
    layers = sorted(whole[axis].dropna().unique()) or [0.0]
    for number, part in enumerate(means.values()):
        for control, own in lines_of(part, axis=axis, layers=layers):
            for trace in _curve(own, axis=axis, control=control, metric=metric):
                figure.add(trace | {"showlegend": number == 0}, panel=number)
    place = axis.replace("_", " ")
    legend = {"orientation": "h", "y": 1.02 if len(means) == 1 else 1.12, "yanchor": "bottom", "x": 0}
    title = f"{metric} by {place}{' and scale' if len(means) > 1 else ''}, mean over {_averaged(table)}"
    width = {"width": 90 + _PANEL_WIDTH * len(means)} if len(means) > 1 else {}
    style.apply(figure, title=title, height=400, hovermode="x", legend=legend, **width)
    figure.axes("x", title=place, range=[layers[0] - 0.5, layers[-1] + 0.5], **style.layer_ticks(layers))
    figure.axes("y", title=style.metric_title(metric, known), column=0)
    figure.axes("y", **style.metric_range(whole, metric))
    if metric == "rank" and whole["mean"].max() > _LOG * whole["mean"].min():
        figure.axes("y", type="log", dtick=1)
    return figure


def _averaged(table: pd.DataFrame) -> str:
    """Name what a mean by layer averages over."""
    real = table[table["source_layer"].notna()]
    over = ["data rows"]
    if "source_position" in real.columns and rows_with_positions(real):
        over.append("positions")
    if "sample" in real.columns and len(real["sample"].unique()) > 1:
        over.append("noise samples")
    return listed(over)


def _curve(means: pd.DataFrame, *, axis: str, control: str, metric: str) -> Iterator[Part]:
    """Yield the line of one control; for the patched cells, first the band under it."""
    colour, dash = style.line_of(control)
    if control == REAL and means["low"].notna().any():
        yield style.band(means, axis, colour=colour, opacity=0.22, name="95 % interval")
    hover = [
        hover_text(mean, f"{control}, layer {layer_name(mean[axis])}: {metric}")
        for mean in means.to_dict("records")
    ]
    yield {
        "type": "scatter",
        "x": means[axis].tolist(),
        "y": means["mean"].tolist(),
        "name": style.panel(control),
        "mode": "lines+markers" if control == REAL or len(means) == 1 else "lines",
        "line": {"color": colour, "dash": dash, "width": 2.5 if control == REAL else 2},
        "marker": {"size": 6},
        "text": hover,
        "hovertemplate": "%{text}<extra></extra>",
    }


def layer_pair_heatmap(
    table: pd.DataFrame, *, metric: str, known: Mapping[str, MetricInfo] | None = None
) -> Drawing:
    """Draw the mean of a metric by source layer (across) and target layer (up), in a panel per control.

    Raises:
        InputError: The table has no such metric, or plotly is not installed.
    """
    means = {name: layer_means(part, metric=metric) for name, part in by_scale(table).items()}
    return _pairs(means, metric=metric, known=known)


def _pairs(parts: dict[str, pd.DataFrame], *, metric: str, known: Mapping[str, MetricInfo] | None) -> Drawing:
    panels: list[Panel] = []
    without_layer: dict[str, float] = {}
    for name, means in parts.items():
        layered = means[means["source_layer"].notna()]
        without_layer |= means[means["source_layer"].isna()].set_index("control")["mean"].to_dict()
        for control in controls_of(layered):
            cells = layered[layered["control"] == control]
            hover = []
            for mean in cells.to_dict("records"):
                source, target = layer_name(mean["source_layer"]), layer_name(mean["target_layer"])
                layers = f"source layer {source}, target layer {target}"
                hover.append(hover_text(mean, ", ".join(filter(None, (control, name))), layers, metric))
            title = ", ".join(filter(None, (style.panel(control), name)))
            cells = cells.assign(x=cells["source_layer"], y=cells["target_layer"], hover=hover)
            panels.append(Panel(title, cells, cells["control"] == REAL))
    aside = "".join(f"; {control} (control): {mean:.3g}" for control, mean in without_layer.items())
    figure = heatmaps(panels, title=f"{metric} by source and target layer{aside}", metric=metric, known=known)
    cells = pd.concat([part.cells for part in panels]) if panels else pd.DataFrame({"x": [], "y": []})
    figure.axes("x", title="source layer", **style.layer_ticks(sorted(cells["x"].unique())))
    figure.axes("y", title="target layer", **style.layer_ticks(sorted(cells["y"].unique())))
    return figure
