"""Publication figures as PDF, SVG or PNG: matplotlib draws the report's plotly figures, without a browser.

The plotly figure decides what is shown. This module draws its traces with the same colours, dashes and texts.
Fonts are embedded in a PDF, and letters are outlines in an SVG.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscope_nn.errors import FolderError, InputError
from patchscope_nn.report.figures.drawing import Drawing
from patchscope_nn.report.figures.glyphs import families, printable
from patchscope_nn.report.figures.optional import optional

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")
_DPI = 200
_PIXELS = 96  # of the page, in an inch
_WIDTH = 760  # pixels, for a figure without a width of its own
_INK, _GRID = "#1c2129", "#d9dde3"
_DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 2)),
    "dot": (0, (1, 1.5)),
    "dashdot": (0, (5, 1.5, 1, 1.5)),
    "longdash": (0, (9, 2.5)),
    "longdashdot": (0, (9, 2, 1, 2)),
}
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X"}
_STYLE = {
    "pdf.fonttype": 42,  # embedded TrueType, so that the text can be selected
    "svg.fonttype": "path",
    "svg.hashsalt": "patchscope",
    "text.parse_math": False,
    **dict.fromkeys(("font.size", "axes.titlesize"), 8),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


def save_figures(
    drawn: Sequence[tuple[str, Drawing]], folder: str | Path, *, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write the figures of `figures` to files `01-title.pdf`, ...; other files in the folder are kept.

    Returns:
        The files, figure by figure.

    Raises:
        InputError: matplotlib is not installed, or a format is unknown.
        FolderError: The folder cannot be created.
    """
    wrong = [name for name in formats if name not in FORMATS]
    if wrong:
        raise InputError(f"formats={wrong} is not supported.", hint=f"Use some of {', '.join(FORMATS)}.")
    mpl = optional("matplotlib", what="Publication figures", extra="figures")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"{path} cannot be created: {error.strerror}.", hint="Name another folder."
        ) from error
    # Without dates, the same figure always gives the same file.
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    files = []
    for number, (title, figure) in enumerate(drawn, start=1):
        with mpl.rc_context(_STYLE | {"font.family": families()}):
            paper = draw(figure.to_plotly())
            for name in formats:
                file = path / f"{number:02}-{_slug(title)}.{name}"
                paper.savefig(file, format=name, dpi=_DPI, metadata=undated[name])
                files.append(file)
    return files


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "figure"


def draw(figure: go.Figure) -> Figure:
    """Draw a figure of the page as a matplotlib figure that pyplot does not manage."""
    from matplotlib.figure import Figure

    layout = figure.layout
    size = ((layout.width or _WIDTH) / _PIXELS, (layout.height + 40) / _PIXELS)
    paper = Figure(figsize=size, layout="constrained")
    places = _places(figure)
    lines, columns = (1 + max((place[side] for place in places.values()), default=0) for side in (0, 1))
    grid = paper.subplots(lines, columns, squeeze=False)
    used = {key: grid[line, column] for key, (line, column) in places.items()}
    for axes in grid.flat:
        if axes not in used.values():
            axes.set_axis_off()
    names = [_plain(note.text) for note in layout.annotations]
    for index, (key, axes) in enumerate(used.items()):
        image = None
        for trace in figure.data:
            if (trace.xaxis or "x", trace.yaxis or "y") == key:
                image = (_heatmap if trace.type == "heatmap" else _scatter)(axes, trace, layout) or image
        shared = _axis(layout, key[1]).matches is not None
        if shared:
            axes.sharey(next(iter(used.values())))
        _axes(axes, layout, key=key, shared=shared)
        if index < len(names):
            axes.set_title(names[index])
        if image is not None and index == len(used) - 1:
            _colour_bar(paper, image, figure, list(used.values()))
    paper.suptitle(_wrapped(_plain(layout.title.text), width=size[0]), x=0.01, ha="left", fontsize=9)
    handles, labels = next(iter(used.values())).get_legend_handles_labels() if used else ([], [])
    if handles:
        paper.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return paper


def _colour_bar(paper: Figure, image: Any, figure: go.Figure, axes: Sequence[Axes]) -> None:
    """Draw the colour bar of all heatmaps; an end is pointed if some cells are beyond it."""
    colours = figure.layout.coloraxis
    shaded = [np.asarray(trace.z, dtype=float) for trace in figure.select_traces({"coloraxis": "coloraxis"})]
    below = any(np.any(values < colours.cmin) for values in shaded)
    above = any(np.any(values > colours.cmax) for values in shaded)
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
    colorbar = colours.colorbar
    title = _plain(colorbar.title.text or "")
    bar = paper.colorbar(image, ax=axes, label=title, shrink=0.8, pad=0.02, extend=extend)
    if colorbar.tickvals is not None:
        bar.set_ticks(list(colorbar.tickvals), labels=[_plain(text) for text in colorbar.ticktext])


def _places(figure: go.Figure) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the (line, column) of each pair of axes with a trace, from its place on the page."""
    keys = dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in figure.data)
    corners = {
        key: tuple(round((_axis(figure.layout, name).domain or (0, 1))[0], 6) for name in key) for key in keys
    }
    columns = sorted({left for left, _ in corners.values()})
    lines = sorted({bottom for _, bottom in corners.values()}, reverse=True)
    return {key: (lines.index(bottom), columns.index(left)) for key, (left, bottom) in corners.items()}


def _axis(layout: Any, name: str) -> Any:
    return layout[f"{name[0]}axis{name[1:]}"]


def _axes(axes: Axes, layout: Any, *, key: tuple[str, str], shared: bool) -> None:
    """Set the titles, ticks, ranges and scales of both axes."""
    from matplotlib.ticker import NullFormatter

    for side, name in zip("xy", key, strict=True):
        axis, drawn = _axis(layout, name), getattr(axes, f"{side}axis")
        if axis.type == "log":
            axes.set(**{f"{side}scale": "log"})
            drawn.set_major_formatter("{x:g}")
            drawn.set_minor_formatter(NullFormatter())
        if axis.title.text:
            drawn.set_label_text(_plain(axis.title.text))
        if axis.tickvals is not None:
            labels = [_plain(text) for text in axis.ticktext]
            drawn.set_ticks(list(axis.tickvals), labels, rotation=-(axis.tickangle or 0))
        if axis.showticklabels is False:
            drawn.set_tick_params(labelleft=False, labelbottom=False)
        if axis.range is not None:
            axes.set(**{f"{side}lim": axis.range})
    if shared:
        axes.tick_params(labelleft=False)
    if not axes.collections:  # only a heatmap has one
        axes.grid(visible=True, color=_GRID, linewidth=0.5)
        axes.set_axisbelow(True)


def _scatter(axes: Axes, trace: Any, layout: Any) -> None:  # noqa: ARG001 (same signature as _heatmap)
    """Draw a line, a band, or points with their intervals."""
    x, y = np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)
    label = _plain(trace.name or "") if trace.showlegend is not False else ""
    if trace.fill == "toself":
        axes.fill(x, y, color=_colour(trace.fillcolor), linewidth=0, label=label or None)
        return
    lined, marked = "lines" in (trace.mode or "lines"), "markers" in (trace.mode or "")
    symbol = str(trace.marker.symbol or "circle")
    colour = trace.line.color if lined else trace.marker.color or trace.marker.line.color
    options: dict[str, Any] = {
        "color": _colour(colour),
        "linestyle": _DASHES[trace.line.dash or "solid"] if lined else "none",
        "linewidth": 0.6 * (trace.line.width or 2),
        "marker": ("x" if symbol == "x-thin" else _MARKERS[symbol.removesuffix("-open")]) if marked else "",
        "markersize": 0.5 * float(trace.marker.size or 6),
        "label": label or None,
    }
    if symbol.endswith("-open"):
        options["markerfacecolor"] = "none"
    if trace.error_y.array is not None:
        spread = [np.asarray(trace.error_y.arrayminus), np.asarray(trace.error_y.array)]
        axes.errorbar(x, y, yerr=spread, capsize=2, **options)
    else:
        axes.plot(x, y, **options)


def _heatmap(axes: Axes, trace: Any, layout: Any) -> Any:
    """Draw the cells and the words on them; return the image if it needs a colour bar."""
    from matplotlib.colors import ListedColormap

    values = np.ma.masked_invalid(np.asarray(trace.z, dtype=float))
    flat = trace.coloraxis is None
    colours = ListedColormap([trace.colorscale[0][1]]) if flat else "cividis"
    low, high = (0.0, 1.0) if flat else (layout.coloraxis.cmin, layout.coloraxis.cmax)
    x, y = (
        np.arange(size) if centres is None else np.asarray(centres, dtype=float)
        for centres, size in ((trace.x, values.shape[1]), (trace.y, values.shape[0]))
    )
    edge = {"edgecolors": "white", "linewidth": 0.4} if trace.xgap else {}
    options: dict[str, Any] = {"cmap": colours, "vmin": low, "vmax": high, **edge}
    image = axes.pcolormesh(_edges(x), _edges(y), values, **options)
    if trace.texttemplate:
        for line, column in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True):
            words = _plain(trace.text[line][column])
            ink = {"color": trace.textfont.color, "fontsize": 6, "ha": "center", "va": "center"}
            axes.text(x[column], y[line], words, clip_on=True, **ink)
    return None if flat else image


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders of cells, half way between their centres; a single cell is one unit wide."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _colour(css: str) -> Any:
    """Convert a colour, `#rrggbb` or `rgba(...)`, for matplotlib."""
    if not css.startswith("rgba"):
        return css
    red, green, blue, opacity = map(float, re.findall(r"[\d.]+", css))
    return (red / 255, green / 255, blue / 255, opacity)


def _plain(text: str) -> str:
    """Convert plotly's HTML to plain text with line breaks, in characters that the fonts can draw."""
    lines = text.split("<br>")
    return "\n".join(printable(html.unescape(re.sub(r"<[^>]*>", "", line))) for line in lines)


def _wrapped(text: str, *, width: float) -> str:
    return "\n".join(textwrap.wrap(text, width=max(30, int(width * 13))))
