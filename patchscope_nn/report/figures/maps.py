"""Heatmaps of a metric in panels with one colour scale, and the heatmap by token and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.analysis.statistics import REAL, control_names, mean_text, numbers
from patchscope_nn.metrics import MetricInfo
from patchscope_nn.report.figures import style
from patchscope_nn.report.figures.cell_text import tokens_at
from patchscope_nn.report.figures.drawing import Drawing, Part
from patchscope_nn.report.figures.scale import common_scale
from patchscope_nn.report.figures.table import (
    FLAT_LAYERS,
    NO_LAYER,
    axis_title,
    coded,
    controls_of,
    layer_axis,
    layer_name,
)
from patchscope_nn.report.figures.text import escape, shorten

_COLUMNS = 2
_PROMPT_WIDTH = 60
_TOKEN_WIDTH = 14
_TICKS = 12  # on an axis that is half a page wide
_WIDTH = 760  # pixels, of two panels; their ticks would overlap in a narrower figure


class Panel(NamedTuple):
    """A heatmap: its escaped title, its cells (x, y, mean, hover), and which of them are patched, (cell,)."""

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
) -> Drawing:
    """Draw panels with one colour scale, two side by side. The caller names the axes.

    `height` is that of a panel and `gap` the space between lines of panels, for a title and an axis, both in
    pixels.
    """
    n_columns = min(len(panels), _COLUMNS) or 1
    n_lines = -(-len(panels) // n_columns) or 1
    total = 110 + height * n_lines
    figure = Drawing([part.title for part in panels], columns=n_columns, gap=gap / total)
    for index, part in enumerate(panels):
        figure.add(_trace(part.cells), panel=index)
    style.apply(figure, title=title, height=total)
    figure.axes("x", showgrid=False)
    figure.axes("y", showgrid=False)
    means, patched = np.array([], dtype=float), np.array([], dtype=bool)
    if panels:
        means = pd.concat([part.cells["mean"] for part in panels]).to_numpy()
        patched = pd.concat([part.patched for part in panels]).to_numpy()
    scale = common_scale(means[patched], means[~patched])
    colours = style.colour_axis(scale, title=style.metric_title(metric, known), side="right", thickness=12)
    figure.layout["coloraxis"] = colours
    return figure


def _trace(cells: pd.DataFrame) -> Part:
    grid = cells.pivot_table(values=["mean", "hover"], index="y", columns="x", aggfunc="first")
    return {
        "type": "heatmap",
        "x": grid["mean"].columns.tolist(),
        "y": grid.index.tolist(),
        "z": grid["mean"].to_numpy(),
        "text": grid["hover"].fillna("").to_numpy(),
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "coloraxis": "coloraxis",
    }


def hover_text(mean: dict[Any, Any], *heading: str) -> str:
    """Return the hover text of a mean: lines that name it, then its value and interval."""
    return f"{'<br>'.join(map(escape, heading))} {mean_text(mean)}, {mean['n_rows']} rows"


def rows_with_positions(table: pd.DataFrame) -> list[Any]:
    """Return the data rows in which several positions were read separately, in order."""
    real = table[table["source_layer"].notna() & table["control"].isna()]
    positions = pd.Series(coded(real["source_position"])[0], index=real.index)
    counts = positions.groupby(real["row"], sort=False).nunique()
    return [row for row, count in counts.items() if count > 1]


def token_heatmap(
    table: pd.DataFrame, *, metric: str, row: Any, known: Mapping[str, MetricInfo] | None = None
) -> Drawing:
    """Draw a metric of one data row by token read (down) and layer (across), with a panel for each control.

    Controls that read no layer are left of the patched cells. Each number is the mean over noise samples,
    scales and other target layers.

    Raises:
        InputError: plotly is not installed.
    """
    own = table[table["row"] == row]
    cells = _by_token(own, metric=metric)
    real = own[own["control"].isna() & own["source_layer"].notna()]
    tokens = [tokens_at(cell, width=_TOKEN_WIDTH) for cell in real.to_dict("records")]
    names = dict(zip(cells.loc[real.index, "y"], tokens, strict=True))
    cells = cells[np.isfinite(cells["mean"]) & cells["y"].isin(list(names))]
    cells = pd.concat([cells, *_repeated(cells, lines=list(names))], ignore_index=True)
    flat = cells["layer"] <= NO_LAYER
    columns = sorted(cells["layer"].unique())
    panels = []
    for control in controls_of(cells[~flat]):
        drawn = (cells["control"] == control) | (flat if control == REAL else False)
        means = cells[drawn].groupby(["layer", "y"], as_index=False)["mean"].mean()
        name = style.panel(control)
        hover = [
            f"{name}, {escape(names[y])}, layer {layer_name(layer)}<br>{escape(metric)} {mean:.3g}"
            for layer, y, mean in zip(means["layer"], means["y"], means["mean"], strict=True)
        ]
        means["x"] = [columns.index(layer) for layer in means["layer"]]
        patched = (means["layer"] > NO_LAYER) & (control == REAL)
        panels.append(Panel(name, means.assign(hover=hover), patched))
    prompt = shorten(real["source_prompt"].iloc[0], width=_PROMPT_WIDTH, tail=True)
    title = f"{metric} by token and layer, row {row}: {prompt}"
    height = 130 + 22 * len(names)
    figure = heatmaps(panels, title=title, metric=metric, known=known, height=height, gap=140)
    step = -(-len(columns) // _TICKS)
    ticks = [x for x, layer in enumerate(columns) if layer <= NO_LAYER or x % step == 0]
    labels = [layer_name(columns[x]) for x in ticks]
    figure.axes("x", title=axis_title(table), tickvals=ticks, ticktext=labels, tickangle=-90)
    labels, ends = list(map(escape, names.values())), [max(names, default=0) + 0.5, -0.5]
    figure.axes("y", title="token read", tickvals=list(names), ticktext=labels, range=ends)
    if len(panels) > 1:
        figure.layout["width"] = _WIDTH
        # The panel on the left has the same tokens, and long names would overlap it.
        figure.axes("y", title="", showticklabels=False, column=1)
    return figure


def _repeated(cells: pd.DataFrame, *, lines: Sequence[int]) -> Iterator[pd.DataFrame]:
    """Yield the single cell of a control that reads no layer, once for every line but the first."""
    for _, own in cells[cells["layer"] <= NO_LAYER].groupby("control"):
        if set(own["y"]) == {0}:
            yield from (own.assign(y=line) for line in lines if line)


def _by_token(own: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Return the cells of one data row: control, layer, y (the token's number among those read), and mean."""
    layers = numbers(own[layer_axis(own) or "source_layer"])
    cells = own.assign(control=control_names(own), layer=layers, mean=numbers(own[metric]))
    varied = [name for name in ("scale", "sample") if name in own.columns]
    layered = [*varied, "control", "source_layer", "target_layer", "target_prompt"]
    # Positions come in the same order for the real cells and each control.
    cells["y"] = cells.groupby(layered, dropna=False, sort=False).cumcount()
    flat = cells["source_layer"].isna()
    cells.loc[flat, "y"] = cells[flat].groupby([*varied, "control"], dropna=False, sort=False).cumcount()
    cells.loc[flat, "layer"] = [FLAT_LAYERS.get(control, NO_LAYER) for control in cells.loc[flat, "control"]]
    return cells[["control", "layer", "y", "mean"]]
