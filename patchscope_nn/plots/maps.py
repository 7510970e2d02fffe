"""Heatmaps of a metric, in panels on one colour scale: what pairs of layers, or tokens and layers, share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.plots.style import colour_axis, layer_ticks, metric_title, panel, plotly, style
from patchscope_nn.plots.table import as_list, controls_of, layer_axis, layer_name
from patchscope_nn.plots.text import escape, shorten
from patchscope_nn.statistics import REAL, is_null, numbers

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLUMNS = 2
_PROMPT_WIDTH = 60
_TOKEN_WIDTH = 14


class Panel(NamedTuple):
    """A heatmap: its title, escaped, its cells (x, y, mean and hover), and whether it is no control."""

    title: str
    cells: pd.DataFrame
    real: bool


def heatmaps(panels: Sequence[Panel], *, title: str, metric: str, height: int = 340) -> go.Figure:
    """Panels on one colour scale, two in a line; the axes are the caller's to name.

    The scale spans the patched cells; a control beyond it has the colour of its end.

    Args:
        panels: The panels.
        title: The figure's.
        metric: What the colours say.
        height: Of a panel, pixels.
    """
    from plotly.subplots import make_subplots

    n_columns = min(len(panels), _COLUMNS) or 1
    n_lines = -(-len(panels) // n_columns) or 1
    # Between the panels stand a title and an axis, which take the same room however many lines there are.
    whole = 110 + height * n_lines
    figure = make_subplots(
        n_lines, n_columns, subplot_titles=[one.title for one in panels], vertical_spacing=92 / whole
    )
    for index, one in enumerate(panels):
        figure.add_trace(_trace(one.cells), row=index // n_columns + 1, col=index % n_columns + 1)
    style(figure, title=title, height=whole)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    shown = np.concatenate([one.cells["mean"].to_numpy() for one in panels if one.real] or [np.array([])])
    colours = colour_axis(shown, title=metric_title(metric), side="right", thickness=12)
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


def token_heatmap(table: pd.DataFrame, *, metric: str, row: Any) -> go.Figure:
    """A metric of one data row for each token read (down) and layer (across), one panel for each control.

    Each number is the mean over what else varies: samples of the noise, scales, other target layers.

    Args:
        table: The tidy table of a sweep over positions.
        metric: A column with numbers.
        row: The data row.

    Raises:
        InputError: plotly is not installed.
    """
    plotly()
    cells = _by_token(table[table["row"] == row], metric=metric)
    layered = cells[cells["layer"].notna()]
    names = dict(zip(layered["y"], layered["name"], strict=True))
    panels = []
    for control in controls_of(layered):
        own = layered[layered["control"] == control].groupby(["layer", "y"], as_index=False)["mean"].mean()
        hover = [
            f"{panel(control)}, {escape(names[y])}, layer {layer_name(layer)}<br>{escape(metric)} {mean:.3g}"
            for layer, y, mean in zip(own["layer"], own["y"], own["mean"], strict=True)
        ]
        panels.append(Panel(panel(control), own.assign(x=own["layer"], hover=hover), control == REAL))
    flat = cells[cells["layer"].isna()].groupby("control")["mean"].mean()
    aside = "".join(f"; {control} (control): {mean:.3g}" for control, mean in flat.items())
    prompts = table.loc[(table["row"] == row) & table["source_layer"].notna(), "source_prompt"]
    prompt = shorten(prompts.iloc[0], width=_PROMPT_WIDTH, tail=True)
    title = f"{metric} by token and layer, row {row}: {prompt}{aside}"
    figure = heatmaps(panels, title=title, metric=metric, height=130 + 22 * len(names))
    axis = (layer_axis(table) or "source_layer").replace("_", " ")
    figure.update_xaxes(title=axis, **layer_ticks(sorted(layered["layer"].unique())))
    ends = [max(names, default=0) + 0.5, -0.5]
    ticks = {"tickvals": list(names), "ticktext": list(map(escape, names.values())), "range": ends}
    return figure.update_yaxes(**ticks)


def _by_token(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Cells of one data row: control, layer, y (the line of the token), its name, and the metric as mean."""
    layers = numbers(table[layer_axis(table) or "source_layer"])
    spots = [tuple(as_list(place)) for place in table["source_position"]]
    order = {spot: line for line, spot in enumerate(sorted({spot for spot in spots if spot}))}
    cells = pd.DataFrame(
        {
            "control": [REAL if is_null(control) else str(control) for control in table["control"]],
            "layer": layers,
            "y": [order.get(spot, -1) for spot in spots],
            "name": [
                f"{shorten(' '.join(str(one).strip() for one in as_list(tokens)), width=_TOKEN_WIDTH)}"
                f" ({', '.join(map(str, spot))})"
                for tokens, spot in zip(table["source_token"], spots, strict=True)
            ],
            "mean": numbers(table[metric]),
        }
    )
    return cells[np.isfinite(cells["mean"])].sort_values("y", kind="stable")
