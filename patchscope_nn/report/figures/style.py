"""Shared style of figures: colours that are legible on light and dark pages, axes of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchscope_nn.analysis.statistics import REAL
from patchscope_nn.metrics import MetricInfo, described
from patchscope_nn.report.figures.drawing import Drawing, Part
from patchscope_nn.report.figures.scale import Scale
from patchscope_nn.report.figures.table import layer_name
from patchscope_nn.report.figures.text import escape, wrap

if TYPE_CHECKING:
    import pandas as pd

#: The colours of Okabe and Ito that are visible on white and on near-black.
COLOURS = ("#2b8cc4", "#e69f00", "#cc79a7", "#009e73", "#d55e00", "#8a8f98")
#: The colour and dash of the patched cells and of each control, in all figures.
_LINES = {
    REAL: ("#2b8cc4", "solid"),
    "unpatched": ("#8a8f98", "dashdot"),
    "random": ("#e69f00", "dash"),
    "shuffled": ("#cc79a7", "dot"),
    "text-only": ("#009e73", "longdash"),
    # Controls of a linear probe.
    "commonest class": ("#8a8f98", "dashdot"),
    "shuffled labels": ("#cc79a7", "dot"),
}
_OTHER_LINE = ("#d55e00", "longdashdot")
_INK = "#7a7f87"  # a grey that is legible on white and on near-black
_CLEAR = "rgba(0,0,0,0)"
_AXIS: Part = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "automargin": True}
_LAYOUT = {
    "paper_bgcolor": _CLEAR,
    "plot_bgcolor": _CLEAR,
    "font": {"color": _INK, "size": 12},
    "hoverlabel": {
        "bgcolor": "#1f2430",
        "bordercolor": "#5b6270",
        "font": {"color": "#f4f5f7", "size": 12},
        "align": "left",
    },
    "modebar": {"bgcolor": _CLEAR, "remove": ["sendChartToCloud"], "color": _INK, "activecolor": "#2b8cc4"},
    "margin": {"l": 56, "r": 16, "t": 64, "b": 48},
}
#: The colours of plotly's Cividis, from the lower end to the upper.
_CIVIDIS = [
    [step / 9, colour]
    for step, colour in enumerate(
        (
            "#00224e",
            "#123570",
            "#3b496c",
            "#575d6d",
            "#707173",
            "#8a8678",
            "#a59c74",
            "#c3b369",
            "#e1cc55",
            "#fee838",
        )
    )
]
_ROOM = 8  # with fewer blocks than this, the ticks "embed" and "0" do not overlap


def apply(figure: Drawing, *, title: str, **layout: Any) -> None:
    """Set a figure's title and layout, with a transparent background and grey text."""
    heading = {"text": escape(title), "x": 0, "xref": "paper", "font": {"size": 15}}
    figure.layout |= {"title": heading, **_LAYOUT, **layout}
    figure.axes("x", **_AXIS)
    figure.axes("y", **_AXIS)


def band(means: pd.DataFrame, axis: str, *, colour: str, opacity: float, **options: Any) -> Part:
    """Draw the intervals of `layer_means` over the column `axis` as a band."""
    drawn = means[means["low"].notna()]
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return {
        "type": "scatter",
        "x": [*drawn[axis], *drawn[axis][::-1]],
        "y": [*drawn["high"], *drawn["low"][::-1]],
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},{opacity})",
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        **options,
    }


def line_of(control: str) -> tuple[str, str]:
    """Return the colour and dash of the patched cells or of a control."""
    return _LINES.get(control, _OTHER_LINE)


def panel(control: str) -> str:
    """Return the name of the patched cells or of a control in a figure, escaped."""
    return control if control == REAL else escape(f"{control} (control)")


def metric_title(metric: str, known: Mapping[str, MetricInfo] | None = None) -> str:
    """Return the title of a metric's axis, or the name of its column if it has no title; see `figures`."""
    info = (described({}) if known is None else known).get(metric)
    name = "Accuracy of the probe" if metric == "probe_accuracy" else metric
    return wrap((info.title if info else "") or name, width=38)


def metric_range(means: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return the range of a metric's axis: 0 to 1 if all means are within it and it is not in nats."""
    within = means["mean"].between(0, 1).all() and not metric.endswith("_nats")
    return {"range": [-0.02, 1.05]} if within else {}


def layer_ticks(layers: Sequence[float]) -> dict[str, Any]:
    """Choose about sixteen ticks at most, so that neither they nor "embed" overlap on a narrow page."""
    blocks = [layer for layer in layers if layer >= 0]
    step = -(-len(blocks) // 16)
    ticks = blocks[::step] if step else []
    if -1 in layers:
        ticks = [-1.0, *(tick for tick in ticks if tick > step or len(blocks) < _ROOM)]
    return {"tickvals": ticks, "ticktext": [layer_name(tick) for tick in ticks]}


def colour_axis(scale: Scale, *, title: str, side: str, **bar: Any) -> dict[str, Any]:
    """Return the layout of a colour scale and its bar, with an escaped title on one `side` of it."""
    bar["title"] = {"text": title, "side": side}
    return {"colorscale": _CIVIDIS, "cmin": scale.low, "cmax": scale.high, "colorbar": bar | scale.ticks()}
