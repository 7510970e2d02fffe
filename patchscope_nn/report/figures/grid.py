"""The text heatmap: the answer of each cell, with data rows (or tokens) down and layers across."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.report.figures import style
from patchscope_nn.report.figures.cell_text import Cells, read_cells
from patchscope_nn.report.figures.drawing import Drawing, Part
from patchscope_nn.report.figures.lines import MAX_ROWS, text_lines
from patchscope_nn.report.figures.scale import Scale, limits
from patchscope_nn.report.figures.table import axis_title, layer_name
from patchscope_nn.report.figures.text import escape, text_width

_CIVIDIS_MIDDLE = 0.48  # white reads better below it, black above
_FLAT = [[0.0, "#3b496c"], [1.0, "#3b496c"]]
#: The colour bar is above the grid on the left, because the right end of a wide figure may be out of view.
_BAR_PLACE = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "ypad": 6}
_BAR_SIZE = {"thickness": 10, "lenmode": "pixels", "len": 240, "nticks": 5}


class _Spot(NamedTuple):
    """A place in the grid, and the index of the cell that is drawn there."""

    x: int
    y: int
    cell: int


def text_heatmap(table: pd.DataFrame, *, value: str | None = None) -> Drawing:
    """Draw the answer of each cell: data rows (or tokens of one prompt) down, layers across.

    A control that reads no layer (unpatched, text-only) is a line on top if it is the same for all rows, and
    a column on the left otherwise. The other controls are lines at the bottom if there is room. Each scale
    has its own line; with several noise samples, the first is drawn. Cells that failed are crosses. At most
    40 rows are drawn, and the title says if there are more. Cells are shaded by the column `value`; by
    default by the probability of the answer, or for generated text by the first metric.

    Raises:
        InputError: The readout does not answer in words, the table has no column `value`, or plotly is not
            installed.
    """
    figure = Drawing()
    cells = read_cells(table, value=value)
    lines, n_rows = text_lines(table, cells=cells)
    columns = sorted({layer for line in lines for layer in line.cells})
    place = {layer: x for x, layer in enumerate(columns)}
    spots = [
        _Spot(place[layer], y, cell) for y, line in enumerate(lines) for layer, cell in line.cells.items()
    ]
    figure.add(*_traces(spots, cells=cells, shape=(len(lines), len(columns))))
    shaded = f", shaded by {cells.scale}" if cells.scale else ""
    cut = f" (first {MAX_ROWS} of {n_rows} rows)" if n_rows > MAX_ROWS else ""
    n_samples = table["sample"].nunique() if "sample" in table.columns else 1
    sample = f", first of {n_samples} samples" if n_samples > 1 else ""
    title = f"{cells.kind.title.capitalize()} for each state{shaded}{sample}{cut}"
    cell_width = max([34, *(8 + 7 * text_width(cells.label(spot.cell)) for spot in spots)])
    style.apply(figure, title=title, height=160 + 25 * len(lines), width=230 + cell_width * len(columns))
    if cells.scale:
        scale = Scale(*limits(cells.shades))
        bar = style.colour_axis(scale, title=escape(cells.scale), side="top", **_BAR_PLACE, **_BAR_SIZE)
        figure.layout["coloraxis"] = bar
    figure.axes(
        "x",
        title={"text": axis_title(table), "standoff": 12},
        **_ticks([layer_name(layer) for layer in columns]),
    )
    figure.axes("y", **_ticks([line.name for line in lines], down=True))
    return figure


def _ticks(names: Sequence[str], *, down: bool = False) -> dict[str, Any]:
    """Return an axis with a name for each line or column; with `down`, the first is on top."""
    ends = [-0.5, len(names) - 0.5]
    return {
        "showgrid": False,
        "tickvals": list(range(len(names))),
        "ticktext": list(map(escape, names)),
        "range": ends[::-1] if down else ends,
    }


def _traces(spots: Sequence[_Spot], *, cells: Cells, shape: tuple[int, int]) -> Iterator[Part]:
    """Yield the cells in four groups: not shaded, with white text, with black text, and failed."""
    low, high = limits(cells.shades)
    groups: dict[str, list[_Spot]] = {"flat": [], "dark": [], "bright": [], "failed": []}
    for spot in spots:
        share = (cells.shades[spot.cell] - low) / (high - low)
        if not cells.label(spot.cell):
            groups["failed"].append(spot)
        elif not np.isfinite(share):
            groups["flat"].append(spot)
        else:
            groups["bright" if share > _CIVIDIS_MIDDLE else "dark"].append(spot)
    for kind, ink in (("flat", "#ffffff"), ("dark", "#ffffff"), ("bright", "#000000")):
        if groups[kind]:
            fill = {"colorscale": _FLAT, "showscale": False} if kind == "flat" else {"coloraxis": "coloraxis"}
            yield _words(groups[kind], cells=cells, shape=shape, ink=ink, **fill)
    if groups["failed"]:
        yield _crosses(groups["failed"], cells=cells)


def _words(spots: Sequence[_Spot], *, cells: Cells, shape: tuple[int, int], ink: str, **fill: Any) -> Part:
    """Return a heatmap of labelled cells with one text colour; the rest of the grid is empty."""
    z, text, hover = np.full(shape, np.nan), np.full(shape, "", object), np.full(shape, "", object)
    for x, y, cell in spots:
        z[y, x] = cells.shades[cell] if "coloraxis" in fill else 0.0
        text[y, x], hover[y, x] = escape(cells.label(cell)), cells.hover(cell)
    return {
        "type": "heatmap",
        "z": z,
        "text": text,
        "hovertext": hover,
        "texttemplate": "%{text}",
        "textfont": {"size": 11, "color": ink},
        "hovertemplate": "%{hovertext}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        **fill,
    }


def _crosses(spots: Sequence[_Spot], *, cells: Cells) -> Part:
    return {
        "type": "scatter",
        "x": [spot.x for spot in spots],
        "y": [spot.y for spot in spots],
        "mode": "markers",
        "marker": {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": "#d55e00"}},
        "hovertext": [cells.hover(spot.cell) for spot in spots],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "showlegend": False,
    }
