"""Figures of a run's table: a metric by layer, and what each hidden state says. Returned, never shown.

Every function takes the tidy table of DESIGN section 4 (one row per cell) and leaves it as it is.
Plotly reads its labels as a small HTML, and what a model says is not ours to trust, so all text
passes through `visible` (control characters become signs one can see) and is then escaped.
"""

from __future__ import annotations

import html
import re
import textwrap
import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from patchscope_nn.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import plotly.graph_objects as go

BASE_COLUMNS = (
    *("row", "control", "source_prompt", "source_position", "source_token", "source_layer", "target_prompt"),
    *("target_position", "target_token", "target_layer", "source_model", "target_model", "mapping"),
)
READOUT_COLUMNS = (
    *("top_tokens", "top_ids", "top_probs", "entropy_nats", "reference_tokens", "reference_ids"),
    *("reference_logprobs", "reference_ranks", "surprisal_nats", "nll_nats", "text", "stopped"),
    *("choices", "choice_logprobs", "choice_probs", "choice", "hidden"),
)
MAX_ROWS = 40
MAX_LINES_WITH_CONTROLS = 20
LABEL_WIDTH, PROMPT_WIDTH, HOVER_CHARACTERS = 12, 26, 300
BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 1000, 0

REAL = "patched"
_INK = "#7a7f87"  # one grey that can be read on white and on near-black
_LINES = {REAL: ("#2b8cc4", "solid"), "random": ("#e69f00", "dash"), "shuffled": ("#cc79a7", "dot")}
_OTHER_LINES = ("#8a8f98", "dashdot")
_CIVIDIS_MIDDLE = 0.48  # white reads better below it, black above
_FLAT = [[0.0, "#3b496c"], [1.0, "#3b496c"]]
_SAID = {"top_tokens": "top next token", "text": "generated text", "choice": "chosen option"}
_NO_LAYER = -2.0
_ROOM = 8  # with fewer blocks than this, the tick "embed" has room beside the tick "0"
_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\u2028": "⏎", "\u2029": "⏎", "\x7f": "␡"}
_BIDI = "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"  # they would reorder the text around them
_UNSEEN = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_BIDI}]")


# ---- text ------------------------------------------------------------------------------------------


def _sign(found: re.Match[str]) -> str:
    """One character as something that can be seen, and that can be written as UTF-8."""
    character = found[0]
    if "\ud800" <= character <= "\udfff":
        return "\ufffd"
    unnamed = chr(0x2400 + ord(character)) if character < " " else f"⟨U+{ord(character):04X}⟩"
    return _SIGNS.get(character, unnamed)


def visible(text: object, *, keep: str = "") -> str:
    """Text with its line breaks, control and direction characters shown as signs (⏎, ⇥, ␀, ⟨U+202E⟩).

    Args:
        text: Anything; None is the empty text.
        keep: Characters left as they are, such as a line break.

    Returns:
        Text that is safe to encode, though not yet to put into HTML.
    """
    if text is None:
        return ""
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else _sign(found), str(text))


def _width(character: str) -> int:
    """Columns that one character takes: 0 for combining marks, 2 for wide ones such as emoji."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def text_width(text: str) -> int:
    """Columns that a text takes on a screen."""
    return len(text) if text.isascii() else sum(map(_width, text))


def shorten(text: object, *, width: int, tail: bool = False) -> str:
    """Visible text of at most `width` columns; what is cut off leaves an ellipsis.

    Args:
        text: Anything; None is the empty text.
        width: Columns, the ellipsis included.
        tail: Keep the end of the text instead of its beginning.
    """
    given = "" if text is None else str(text)
    # Cut before the slow work: a text may have thousands of characters, and thousands of marks on one.
    part = visible(given[-4 * width :] if tail else given[: 4 * width])
    if len(given) <= 4 * width and text_width(part) <= width:
        return part
    kept, room = "", width - 1
    for character in reversed(part) if tail else part:
        room -= _width(character)
        if room < 0:
            break
        kept = character + kept if tail else kept + character
    return f"…{kept}" if tail else f"{kept}…"


def _lines(shown: str) -> str:
    """Visible text as escaped and wrapped hover text."""
    wrapped = textwrap.wrap(shown, width=72, drop_whitespace=False)
    return "<br>".join(html.escape(line, quote=False) for line in wrapped)


def token(text: object) -> str:
    """A token between quotes, so that its spaces are seen; isolated if it is written from the right."""
    shown = f"'{shorten(text, width=40)}'"
    turns = any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in shown)
    return f"\u2068{shown}\u2069" if turns else shown


# ---- the table -------------------------------------------------------------------------------------


def is_null(value: object) -> bool:
    """Whether a value stands for nothing: None, NaN or pandas' NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and bool(np.isnan(value)))


def as_list(value: Any) -> list[Any]:
    """A list cell as a list, whether it comes from memory (list) or from parquet (array); null is []."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    if isinstance(value, list | tuple):
        return list(value)
    return [] if is_null(value) else [value]


def numbers(column: pd.Series) -> np.ndarray:
    """A column as floats, NaN where it holds no number."""
    if pd.api.types.is_numeric_dtype(column):
        return np.asarray(column.to_numpy(dtype=float, na_value=np.nan))
    counted = (int, float, np.number, np.bool_)
    return np.array(
        [float(x) if isinstance(x, counted) and not is_null(x) else np.nan for x in column], float
    )


def layer_name(layer: float) -> str:
    """A block's number as text; -1 is "embed", and none at all is "unpatched"."""
    return (
        "unpatched" if np.isnan(layer) or layer == _NO_LAYER else "embed" if layer == -1 else str(int(layer))
    )


def reads_sink(cell: Any) -> bool:
    """Whether a cell (a mapping by column) reads or writes position 0, the attention sink."""
    if cell.get("control") == "unpatched":
        return False
    return 0 in as_list(cell.get("source_position")) or 0 in as_list(cell.get("target_position"))


def metric_columns(table: pd.DataFrame, *, declared: Iterable[Any] = ()) -> list[str]:
    """The columns that hold a metric: those declared, then the numeric ones that no readout makes.

    Args:
        table: The tidy table.
        declared: A recipe's `metrics`: names, or {name: parameters}. `surprisal` also means `surprisal_nats`.
    """
    names = [name for entry in declared for name in ([entry] if isinstance(entry, str) else entry)]
    wanted = [column for name in names for column in (name, f"{name}_nats")]
    known = {*BASE_COLUMNS, *READOUT_COLUMNS, "error"}
    wanted += [str(column) for column in table.columns if column not in known]
    return [
        column
        for column in dict.fromkeys(wanted)
        if column in table.columns and np.isfinite(numbers(table[column])).any()
    ]


def layer_means(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Mean of a metric for each (control, source layer, target layer), with its 95 % bootstrap interval.

    Data rows are drawn, not cells: cells of one row are not independent.

    Args:
        table: The tidy table.
        metric: A column with numbers; cells without one are left out.

    Returns:
        Columns control ("patched" for the real cells), source_layer, target_layer (both NaN for a
        control that reads no layer), mean, low, high (NaN when there is a single row), n_rows.

    Raises:
        InputError: The table has no such column, or no value in it.
    """
    if metric not in table.columns:
        raise InputError(
            f"metric={metric!r} is not a column of this table.",
            hint=f"Use one of: {', '.join(metric_columns(table)) or 'none; this table has no metric'}.",
        )
    layer = numbers(table["source_layer"])
    cells = pd.DataFrame(
        {
            "row": table["row"].to_numpy(),
            "control": [REAL if is_null(control) else str(control) for control in table["control"]],
            "source_layer": layer,
            "target_layer": np.where(np.isnan(layer), np.nan, numbers(table["target_layer"])),
            "value": numbers(table[metric]),
        }
    )
    cells = cells[np.isfinite(cells["value"])]
    if cells.empty:
        raise InputError(f"metric={metric!r} has no value in any cell.", hint="See the column 'error'.")
    groups = cells.groupby(["control", "source_layer", "target_layer"], dropna=False, sort=True)
    low, high, n_rows = _bootstrap(
        cells["row"], value=cells["value"].to_numpy(), group=groups.ngroup().to_numpy()
    )
    means = groups["value"].mean().rename("mean").reset_index()
    return means.assign(low=low, high=high, n_rows=n_rows)


def _bootstrap(
    row: pd.Series, *, value: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 2.5 and 97.5 percentiles of each group's mean over draws of data rows, and its number of rows."""
    code, names = pd.factorize(row)
    shape = (len(names), int(group.max()) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (code, group), value)
    np.add.at(counts, (code, group), 1.0)
    n_rows = (counts > 0).sum(axis=0)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    draws = generator.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size=BOOTSTRAP_DRAWS).astype(
        float
    )
    totals = draws @ counts
    means = np.divide(draws @ sums, totals, out=np.full_like(totals, np.nan), where=totals > 0)
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    alone = n_rows < 2  # noqa: PLR2004 - one row says nothing about its spread
    return np.where(alone, np.nan, low), np.where(alone, np.nan, high), n_rows


# ---- figures ---------------------------------------------------------------------------------------


def _plotly() -> Any:
    try:
        import plotly.graph_objects as module
    except ImportError as error:
        raise InputError(
            "Figures need plotly, which is not installed.", hint="pip install 'patchscope-nn[report]'"
        ) from error
    return module


def _style(figure: go.Figure, *, title: str, **layout: Any) -> go.Figure:
    """Transparent, and grey where it writes, so that it can be read on light and on dark pages."""
    grid = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "automargin": True}
    figure.update_layout(
        title={"text": html.escape(title, quote=False), "x": 0, "xref": "paper", "font": {"size": 15}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": _INK, "size": 12},
        hoverlabel={
            "bgcolor": "#1f2430",
            "bordercolor": "#5b6270",
            "font": {"color": "#f4f5f7", "size": 12},
            "align": "left",
        },
        modebar={
            "bgcolor": "rgba(0,0,0,0)",
            "remove": ["sendChartToCloud"],
            "color": _INK,
            "activecolor": "#2b8cc4",
        },
        margin={"l": 56, "r": 16, "t": 64, "b": 48},
        **layout,
    )
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    return figure


def _layer_ticks(layers: Sequence[float]) -> dict[str, Any]:
    """At most about sixteen ticks, so that they stay apart on a narrow page; "embed" has room beside it."""
    blocks = [layer for layer in layers if layer >= 0]
    step = -(-len(blocks) // 16)
    ticks = blocks[::step] if step else []
    if -1 in layers:
        ticks = [-1.0, *(tick for tick in ticks if tick > step or len(blocks) < _ROOM)]
    return {"tickvals": ticks, "ticktext": [layer_name(tick) for tick in ticks]}


def _layer_axis(table: pd.DataFrame) -> str | None:
    """The column that tells layers apart; None when several target layers cross several source layers."""
    source, target = pd.Series(numbers(table["source_layer"])), pd.Series(numbers(table["target_layer"]))
    target = target[source.notna()]
    if source.nunique() == 1 < target.nunique():
        return "target_layer"
    return None if target.groupby(source).nunique().gt(1).any() else "source_layer"


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
    graph = _plotly()
    means = layer_means(table, metric=metric)
    axis = _layer_axis(means)
    if axis is None:
        return layer_pair_heatmap(table, metric=metric)
    layers = sorted(means[axis].dropna().unique()) or [0.0]
    figure = graph.Figure()
    for control in sorted(means["control"].unique(), key=lambda name: (name != REAL, name)):
        own = means[means["control"] == control].sort_values(axis)
        if own[axis].isna().all():
            own = own.loc[own.index.repeat(len(layers))].assign(**{axis: layers})
        for trace in _curve(own, axis=axis, control=control, metric=metric):
            figure.add_trace(trace)
    place = axis.replace("_", " ")
    _style(figure, title=f"{metric} by {place}, mean over data rows", height=400, hovermode="x")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.update_xaxes(title=place, range=[layers[0] - 0.5, layers[-1] + 0.5], **_layer_ticks(layers))
    figure.update_yaxes(title=html.escape(metric))
    if means["mean"].between(0, 1).all() and not metric.endswith("_nats"):
        figure.update_yaxes(range=[-0.02, 1.05])
    return figure


def _curve(means: pd.DataFrame, *, axis: str, control: str, metric: str) -> Iterator[go.Scatter]:
    """One line, and for the real cells the band under it."""
    graph = _plotly()
    colour, dash = _LINES.get(control, _OTHER_LINES)
    banded = means[means["low"].notna()]
    if control == REAL and not banded.empty:
        yield graph.Scatter(
            x=[*banded[axis], *banded[axis][::-1]],
            y=[*banded["high"], *banded["low"][::-1]],
            fill="toself",
            fillcolor="rgba(43,140,196,0.22)",
            line={"width": 0},
            hoverinfo="skip",
            name="95 % interval",
        )
    yield graph.Scatter(
        x=means[axis].tolist(),
        y=means["mean"].tolist(),
        name=html.escape(control if control == REAL else f"{control} (control)"),
        mode="lines+markers" if control == REAL or len(means) == 1 else "lines",
        line={"color": colour, "dash": dash, "width": 2.5 if control == REAL else 2},
        marker={"size": 6},
        text=[
            _hover_mean(html.escape(f"{control}, layer {layer_name(mean[axis])}: {metric}"), mean)
            for mean in means.to_dict("records")
        ],
        hovertemplate="%{text}<extra></extra>",
    )


def _hover_mean(what: str, mean: dict[Any, Any]) -> str:
    spread = "" if np.isnan(mean["low"]) else f" [{mean['low']:.3g}, {mean['high']:.3g}]"
    return f"{what} {mean['mean']:.3g}{spread}, {mean['n_rows']} rows"


def layer_pair_heatmap(table: pd.DataFrame, *, metric: str) -> go.Figure:
    """Mean of a metric for each source layer (across) and target layer (up), one panel for each control.

    Args:
        table: The tidy table of a sweep that crosses source and target layers.
        metric: A column with numbers.

    Raises:
        InputError: The table has no such metric, or plotly is not installed.
    """
    graph = _plotly()
    from plotly.subplots import make_subplots

    means = layer_means(table, metric=metric)
    layered = means[means["source_layer"].notna()]
    across = means[means["source_layer"].isna()]
    names = sorted(layered["control"].unique(), key=lambda name: (name != REAL, name))
    n_columns = min(len(names), 2) or 1
    n_lines = -(-len(names) // n_columns) or 1
    titles = [name if name == REAL else f"{name} (control)" for name in names]
    figure = make_subplots(n_lines, n_columns, subplot_titles=[html.escape(title) for title in titles])
    for index, name in enumerate(names):
        own = layered[layered["control"] == name]
        grid = own.pivot_table(index="target_layer", columns="source_layer", values="mean")
        hover = own.assign(
            hover=[
                _hover_mean(
                    f"{html.escape(name)}<br>source layer {layer_name(mean['source_layer'])}, target layer"
                    f" {layer_name(mean['target_layer'])}<br>{html.escape(metric)}",
                    mean,
                )
                for mean in own.to_dict("records")
            ]
        ).pivot_table(index="target_layer", columns="source_layer", values="hover", aggfunc="first")
        trace = graph.Heatmap(
            x=grid.columns.tolist(),
            y=grid.index.tolist(),
            z=grid.to_numpy(),
            text=hover.fillna("").to_numpy(),
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
        )
        figure.add_trace(trace, row=index // n_columns + 1, col=index % n_columns + 1)
    aside = "".join(f"; {row.control} (control): {row.mean:.3g}" for row in across.itertuples())
    _style(figure, title=f"{metric} by source and target layer{aside}", height=110 + 340 * n_lines)
    for update, which in ((figure.update_xaxes, "source_layer"), (figure.update_yaxes, "target_layer")):
        update(title=which.replace("_", " "), showgrid=False, **_layer_ticks(sorted(layered[which].unique())))
    scale: dict[str, Any] = {
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": html.escape(metric), "side": "right"}, "thickness": 12},
    }
    if means["mean"].between(0, 1).all():
        scale |= {"cmin": 0, "cmax": 1}
    return figure.update_layout(coloraxis=scale)


class _Line(NamedTuple):
    """One line of a text heatmap: its name, and the index of its cell for each layer."""

    name: str
    cells: dict[float, int]


def text_heatmap(table: pd.DataFrame, *, value: str | None = None) -> go.Figure:
    """What each cell says: data rows (or tokens of one prompt) down, layers across, shaded by a number.

    The unpatched control is a line on top where it is the same for all rows, and else a column on the
    left; the other controls are lines at the bottom when there is room for them. Cells that failed are
    crosses. At most 40 rows are drawn, and the title says when there are more.

    Args:
        table: The tidy table of a next_token, generate or choices readout.
        value: The column that shades the cells; by default the probability of what is said, or for
            generated text its first metric.

    Raises:
        InputError: The readout says nothing in words, `value` is no column, or plotly is not installed.
    """
    graph = _plotly()
    said = next((column for column in _SAID if column in table.columns), None)
    if said is None:
        raise InputError("This table has no text.", hint="Use the readout next_token, generate or choices.")
    shades, scale = _shades(table, value=value)
    records = table.to_dict("records")
    labels = [_label(cell, said=said) for cell in records]
    lines, n_rows = _text_lines(table, looks=list(zip(labels, shades.round(6).astype(str), strict=True)))
    columns = sorted({layer for line in lines for layer in line.cells})
    spots = [
        (x, y, line.cells[layer])
        for y, line in enumerate(lines)
        for x, layer in enumerate(columns)
        if layer in line.cells
    ]
    figure = graph.Figure(
        list(_text_traces(spots, records=records, labels=labels, shades=shades, scale=scale))
    )
    title = f"{_SAID[said].capitalize()} for each state{f', shaded by {scale}' if scale else ''}"
    title += f" (first {MAX_ROWS} of {n_rows} rows)" if n_rows > MAX_ROWS else ""
    cell_width = max(34, 8 + 7 * max((text_width(label) for label in labels), default=0))
    _style(figure, title=title, height=160 + 25 * len(lines), width=230 + cell_width * len(columns))
    if scale:
        figure.update_layout(coloraxis=_colour_axis(shades, name=scale))
    names = [layer_name(layer) for layer in columns]
    figure.update_xaxes(
        title=f"{_layer_axis(table) or 'source_layer'}".replace("_", " "),
        showgrid=False,
        tickvals=list(range(len(columns))),
        ticktext=names,
        range=[-0.5, len(columns) - 0.5],
    )
    figure.update_yaxes(
        showgrid=False,
        tickvals=list(range(len(lines))),
        ticktext=[html.escape(line.name, quote=False) for line in lines],
        range=[len(lines) - 0.5, -0.5],
    )
    return figure


def _text_traces(
    spots: Sequence[tuple[int, int, int]],
    *,
    records: Sequence[dict[Any, Any]],
    labels: Sequence[str],
    shades: np.ndarray,
    scale: str | None,
) -> Iterator[Any]:
    """The labelled cells: those without a number in one dark colour, those with one, and the failed ones.

    Args:
        spots: (column, line, index of the cell).
        records: The table's rows, as are `labels` (empty for a failed cell) and `shades`.
        labels: What each cell says.
        shades: The number that shades each cell, or NaN.
        scale: The name of that number.
    """
    graph = _plotly()
    shape = (max((y for _, y, _ in spots), default=0) + 1, max((x for x, _, _ in spots), default=0) + 1)
    low, high = _limits(shades)
    bright = np.where(np.isfinite(shades), (shades - low) / (high - low) > _CIVIDIS_MIDDLE, False)
    drawn = [i for _, _, i in spots if labels[i]]
    for shaded, light in ((False, False), (True, False), (True, True)):
        own = {i for i in drawn if np.isfinite(shades[i]) == shaded and bright[i] == light}
        z, text, hover = np.full(shape, np.nan), np.full(shape, "", object), np.full(shape, "", object)
        for x, y, i in spots:
            if i in own:
                z[y, x] = shades[i] if shaded else 0.0
                text[y, x], hover[y, x] = html.escape(labels[i], quote=False), _hover(records[i], value=scale)
        if own:
            yield graph.Heatmap(
                z=z,
                text=text,
                hovertext=hover,
                texttemplate="%{text}",
                textfont={"size": 11, "color": "#000000" if light else "#ffffff"},
                hovertemplate="%{hovertext}<extra></extra>",
                hoverongaps=False,
                xgap=1,
                ygap=1,
                **({"coloraxis": "coloraxis"} if shaded else {"colorscale": _FLAT, "showscale": False}),
            )
    failed = [spot for spot in spots if not labels[spot[2]]]
    if failed:
        yield graph.Scatter(
            x=[x for x, _, _ in failed],
            y=[y for _, y, _ in failed],
            mode="markers",
            marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": "#d55e00"}},
            hovertext=[_hover(records[i], value=scale) for _, _, i in failed],
            hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False,
        )


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The ends of a colour scale; numbers within 0..1 share one scale in all figures."""
    finite = values[np.isfinite(values)]
    if not finite.size or (finite.min() >= 0 and finite.max() <= 1):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + 1.0


def _colour_axis(values: np.ndarray, *, name: str) -> dict[str, Any]:
    """The scale, and its bar above on the left: of a wide figure the right end may be out of view."""
    low, high = _limits(values)
    place = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "ypad": 6}
    size = {"thickness": 10, "lenmode": "pixels", "len": 240, "nticks": 5}
    bar = {"title": {"text": html.escape(name), "side": "top"}, **place, **size}
    return {"colorscale": "Cividis", "cmin": low, "cmax": high, "colorbar": bar}


def _shades(table: pd.DataFrame, *, value: str | None) -> tuple[np.ndarray, str | None]:
    """The number that shades each cell (NaN where there is none), and its name."""
    if value is not None and value not in table.columns:
        raise InputError(f"value={value!r} is not a column of this table.", hint="Use a column with numbers.")
    if value is None and "top_probs" in table.columns:
        first = [(as_list(probs) or [np.nan])[0] for probs in table["top_probs"]]
        return np.asarray(first, dtype=float), "probability"
    if value is None and "choice_probs" in table.columns:
        columns = (table["choices"], table["choice_probs"], table["choice"])
        odds = [
            dict(zip(as_list(names), as_list(probs), strict=False)).get(choice, np.nan)
            for names, probs, choice in zip(*columns, strict=True)
        ]
        return np.asarray(odds, dtype=float), "probability"
    name = value or next(iter(metric_columns(table)), None)
    return (np.full(len(table), np.nan), None) if name is None else (numbers(table[name]), name)


def _label(cell: dict[Any, Any], *, said: str) -> str:
    """What a cell says, in a few letters; empty where it failed."""
    value = cell[said]
    if not is_null(cell.get("error")) or is_null(value) or (said == "top_tokens" and not as_list(value)):
        return ""
    text = str(as_list(value)[0])
    return shorten(text.strip(" "), width=LABEL_WIDTH) or ("␣" if text else "(empty)")


def _hover(cell: dict[Any, Any], *, value: str | None) -> str:
    """Everything about one cell, as escaped hover text."""

    def where(side: str) -> str:
        tokens = " ".join(token(text) for text in as_list(cell.get(f"{side}_token")))
        at = ", ".join(map(str, as_list(cell.get(f"{side}_position"))))
        layer = cell.get(f"{side}_layer")
        block = "" if layer is None or is_null(layer) else f", layer {layer_name(layer)}"
        return f"{tokens or 'token'} at position {at}{block}"

    top = zip(as_list(cell.get("top_tokens")), as_list(cell.get("top_probs")), strict=False)
    odds = zip(as_list(cell.get("choices")), as_list(cell.get("choice_probs")), strict=False)
    likely = [f"{token(text)} {probability:.3g}" for text, probability in (*top, *odds)][:10]
    measured = [name for name in dict.fromkeys((value, "surprisal_nats", "nll_nats")) if name in cell]
    parts = [
        f"control: {cell['control']}" if not is_null(cell["control"]) else None,
        f"source: {shorten(cell['source_prompt'], width=140, tail=True)}",
        None if is_null(cell["source_layer"]) else f"read: {where('source')}",
        f"{'target' if is_null(cell['source_layer']) else 'written to'}: {where('target')}",
        "position 0 is an attention sink: its state says little" if reads_sink(cell) else None,
        f"most likely: {', '.join(likely)}" if likely else None,
        *(
            f"{name}: {cell[name]:.3g}"
            for name in measured
            if isinstance(cell[name], int | float) and not is_null(cell[name])
        ),
        f"text: {shorten(cell['text'], width=HOVER_CHARACTERS)}" if not is_null(cell.get("text")) else None,
        f"error: {shorten(cell['error'], width=HOVER_CHARACTERS)}"
        if not is_null(cell.get("error"))
        else None,
    ]
    return "<br>".join(_lines(part) for part in parts if part)


def _text_lines(table: pd.DataFrame, *, looks: Sequence[object]) -> tuple[list[_Line], int]:
    """The lines of a text heatmap from the top down, and how many rows there are in all.

    Args:
        table: The tidy table.
        looks: What each cell would show; unpatched cells that all look the same share one line on top.
    """
    axis = _layer_axis(table)
    layers = numbers(table[axis or "source_layer"])
    across: dict[Any, int] = {}
    places: dict[tuple[str, Any], dict[float, int]] = {}
    for i, cell in enumerate(table.to_dict("records")):
        if is_null(cell["source_layer"]):
            across.setdefault((cell["row"], cell["target_prompt"]), i)
            continue
        positions = (tuple(as_list(cell["source_position"])), tuple(as_list(cell["target_position"])))
        place = (cell["row"], cell["target_prompt"], *positions, None if axis else cell["target_layer"])
        places.setdefault((REAL if is_null(cell["control"]) else cell["control"], place), {})[layers[i]] = i
    real = [place for control, place in places if control == REAL]
    kept = dict.fromkeys(real[:MAX_ROWS])
    names = _line_names(table, cells={place: next(iter(places[REAL, place].values())) for place in kept})
    shared = len({looks[i] for i in across.values()}) == 1
    lines = [_Line(names[place], dict(places[REAL, place])) for place in kept]
    if shared or not lines:
        columns = {layer for line in lines for layer in line.cells} or {_NO_LAYER}
        lines = [_Line("unpatched", dict.fromkeys(columns, i)) for i in list(across.values())[:1]] + lines
    else:
        for place, line in zip(kept, lines, strict=True):
            if place[:2] in across:
                line.cells[_NO_LAYER] = across[place[:2]]
    others = [
        _Line(f"{control}: {names[place]}", cells)
        for (control, place), cells in places.items()
        if control != REAL and place in names
    ]
    fits = len(lines) + len(others) <= MAX_LINES_WITH_CONTROLS
    return lines + others * fits, len(real)


def _line_names(table: pd.DataFrame, *, cells: dict[Any, int]) -> dict[Any, str]:
    """A name for each place (row, target prompt, source positions, target positions, target layer)."""
    rows = {place[0] for place in cells}
    per_row = [len({place[part] for place in cells}) > 1 for part in range(5)]
    many_positions = len({(place[0], place[2]) for place in cells}) > len(rows)
    prompts = table["source_prompt"].to_numpy()
    # The end of a prompt is what the state has just read; where all end alike, the beginning tells more.
    ends = {i: shorten(prompts[i], width=PROMPT_WIDTH, tail=True).strip() for i in cells.values()}
    starts = {i: shorten(prompts[i], width=PROMPT_WIDTH).strip() for i in cells.values()}
    titles = ends if len(set(ends.values())) >= len(set(starts.values())) else starts
    names = {}
    for place, i in cells.items():
        parts = [titles[i]] if len(rows) > 1 or not many_positions else []
        if many_positions:
            words = " ".join(str(text).strip() for text in as_list(table["source_token"].iloc[i]))
            parts.append(f"{shorten(words, width=LABEL_WIDTH)} ({', '.join(map(str, place[2]))})")
        if len({(other[0], other[1]) for other in cells}) > len(rows):
            parts.append(f"→ {shorten(place[1], width=PROMPT_WIDTH, tail=True)}")
        if per_row[4]:
            parts.append(f"→ {layer_name(place[4])}")
        names[place] = " ".join(parts)
    return names


def figures(table: pd.DataFrame, *, metrics: Iterable[Any] = ()) -> list[tuple[str, go.Figure]]:
    """The figures that fit this table: a curve or heatmap for each metric, then what each state says.

    Args:
        table: The tidy table.
        metrics: A recipe's `metrics`; metric columns that it does not name are drawn after these.

    Returns:
        Pairs of a plain-text title and a figure; empty when no cell has a result.

    Raises:
        InputError: Plotly is not installed.
    """
    names = metric_columns(table, declared=metrics)
    drawn = [layer_curve(table, metric=name) for name in names]
    said = [column for column in _SAID if column in table.columns]
    if said and table[said].notna().any(axis=None):
        value = None if {"top_probs", "choice_probs"} & set(table.columns) else next(iter(names), None)
        drawn.append(text_heatmap(table, value=value))
    return [(html.unescape(figure.layout.title.text), figure) for figure in drawn]
