"""A figure as plain dictionaries, in the form that plotly.js draws.

Plotly's Python classes check each value, which takes longer than all else in a report. So a page gets the
dictionaries, and plotly's classes are made only for users and tests, where they check them.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchscope_nn.report.figures.optional import optional

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: A part of a figure: a trace, an axis or a layout.
Part = dict[str, Any]
_GAP = 0.2  # between columns of panels, divided by their number, as a share of the figure's width


class Drawing:
    """A figure, with one panel or several.

    Args:
        titles: The title of each panel, escaped.
        columns: The number of panels side by side.
        gap: The space between lines of panels, as a share of the figure's height.
        shared: True if all panels have the y axis of the first.

    Attributes:
        data: The traces.
        layout: The layout, without its axes.

    Raises:
        InputError: Plotly is not installed.
    """

    def __init__(
        self, titles: Sequence[str] = ("",), *, columns: int = 1, gap: float = 0.0, shared: bool = False
    ) -> None:
        optional("plotly", what="Figures", extra="report")
        self._columns, n_lines = columns, -(-len(titles) // columns) or 1
        self.data: list[Part] = []
        width, height = (
            (1 - space * (n - 1)) / n for space, n in ((_GAP / columns, columns), (gap, n_lines))
        )
        self._axes: list[tuple[Part, Part]] = []
        notes = []
        for index in range(n_lines * columns):
            left = index % columns * (width + _GAP / columns)
            bottom = (n_lines - 1 - index // columns) * (height + gap)
            x, y = (
                {"anchor": _name(side, index), "domain": [start, start + size]}
                for side, start, size in (("y", left, width), ("x", bottom, height))
            )
            self._axes.append(
                (x, y | ({"matches": "y", "showticklabels": False} if shared and index else {}))
            )
            if index < len(titles) and titles[index]:
                notes.append(_heading(titles[index], x=left + width / 2, y=bottom + height))
        self.layout: Part = {"annotations": notes} if notes else {}

    @property
    def title(self) -> str:
        """The title, escaped."""
        return str(self.layout["title"]["text"])

    def add(self, *traces: Part, panel: int = 0) -> None:
        """Add traces to a panel."""
        axes = {f"{side}axis": _name(side, panel) for side in "xy"}
        self.data += [trace | axes for trace in traces]

    def axes(
        self,
        side: Literal["x", "y"],
        *,
        title: str | Part | None = None,
        column: int | None = None,
        **values: Any,
    ) -> None:
        """Set the title and other values of all x or y axes, or of those in a column of panels, from 0 on."""
        if title is not None:
            values["title"] = {"text": title} if isinstance(title, str) else title
        for index, pair in enumerate(self._axes):
            if column in (None, index % self._columns):
                pair["xy".index(side)].update(values)

    def plain(self) -> Part:
        """Return the figure for plotly.js, as values that JSON has."""
        axes = {
            f"{side}axis{index + 1 if index else ''}": axis
            for index, pair in enumerate(self._axes)
            for side, axis in zip("xy", pair, strict=True)
        }
        return {"data": _plain(self.data), "layout": _plain({"template": _template(), **self.layout, **axes})}

    def to_plotly(self) -> go.Figure:
        """Return the figure as plotly's, which checks it."""
        return optional("plotly.graph_objects", what="Figures", extra="report").Figure(self.plain())


def _name(side: str, index: int) -> str:
    return f"{side}{index + 1 if index else ''}"


def _heading(text: str, *, x: float, y: float) -> Part:
    """Return the title of a panel, whose bottom centre is at (x, y)."""
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "center", "yanchor": "bottom"}
    return {"text": text, "font": {"size": 16}, "showarrow": False, **place}


@cache
def _template() -> Part:
    """Return plotly's default template."""
    content: Part = json.loads(pkgutil.get_data("plotly", "package_data/templates/plotly.json") or b"{}")
    return content


def _plain(value: Any) -> Any:
    """Convert arrays and their numbers to Python's own values, with None for numbers that are not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value
