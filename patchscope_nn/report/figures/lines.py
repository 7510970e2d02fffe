"""The lines of a text heatmap: which cells form a line, their order, and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from patchscope_nn.analysis.statistics import REAL, control_names, numbers
from patchscope_nn.report.figures.cell_text import LABEL_WIDTH, Cells, tokens_at
from patchscope_nn.report.figures.table import (
    FLAT_LAYERS,
    NO_LAYER,
    as_list,
    coded,
    layer_axis,
    layer_name,
)
from patchscope_nn.report.figures.text import shorten

MAX_ROWS = 40
_MAX_LINES_WITH_CONTROLS = 20
_PROMPT_WIDTH = 26


class Line(NamedTuple):
    """One line of a text heatmap: the name beside it, and the index of its cell at each layer."""

    name: str
    cells: dict[float, int]


class _Place(NamedTuple):
    """The values that the cells of a line share; `target_layer` is None if it varies along the line."""

    row: Any
    target_prompt: str
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    target_layer: Any
    scale: Any


#: For each control and place, the cell at each layer.
_ByPlace: TypeAlias = dict[tuple[str, _Place], dict[float, int]]
#: For each control that reads no layer, the cells of each row: one for each target prompt or position.
_Flat: TypeAlias = dict[str, dict[Any, list[int]]]


def text_lines(table: pd.DataFrame, *, cells: Cells) -> tuple[list[Line], int]:
    """Return the lines from the top down, and the number of lines of patched cells before the limit.

    The limit is `MAX_ROWS`. Cells of a control that reads no layer share a line on top if they all look the
    same. Otherwise each is on the left of its row's line.
    """
    places, n_real = _by_place(table, cells=cells)
    flat = _flat(table)
    kept = {place: by_layer for (control, place), by_layer in places.items() if control == REAL}
    names = _names(cells, first={place: next(iter(by_layer.values())) for place, by_layer in kept.items()})
    columns = {layer for by_layer in kept.values() for layer in by_layer}
    top = []
    for control, rows in flat.items():
        indices = [index for in_row in rows.values() for index in in_row]
        if cells.alike(indices) or not kept:
            top.append(Line(control, dict.fromkeys(columns or {NO_LAYER}, indices[0])))
            continue
        for place, by_layer in kept.items():
            if place.row in rows:
                by_layer[FLAT_LAYERS.get(control, NO_LAYER)] = _closest(place, rows[place.row], cells)
    lines = top + [Line(names[place], by_layer) for place, by_layer in kept.items()]
    controls = [
        Line(f"{control}: {names[place]}", by_layer)
        for (control, place), by_layer in places.items()
        if control != REAL and place in names
    ]
    fits = len(lines) + len(controls) <= _MAX_LINES_WITH_CONTROLS
    return lines + controls if fits else lines, n_real


def _closest(place: _Place, indices: Sequence[int], cells: Cells) -> int:
    """Return the cell that best matches a place: its target position first, then its target prompt."""

    def matches(index: int) -> tuple[bool, bool]:
        cell = cells.record(index)
        positions = tuple(as_list(cell["target_position"]))
        return positions == place.target_positions, cell["target_prompt"] == place.target_prompt

    return max(indices, key=matches)


def _by_place(table: pd.DataFrame, *, cells: Cells) -> tuple[_ByPlace, int]:
    """Arrange the indices of cells that read a layer in lines: the first `MAX_ROWS`, and their controls.

    Returns:
        The lines, and the number of all lines of patched cells.
    """
    axis = layer_axis(table)
    layers = numbers(table[axis or "source_layer"])
    controls = control_names(table)
    layered = np.flatnonzero(table["source_layer"].notna().to_numpy())
    of_place = ("row", "target_prompt", "source_position", "target_position", "target_layer", "scale")
    varied = [name for name in of_place if name in table.columns and (name != "target_layer" or not axis)]
    codes = pd.DataFrame({name: coded(table[name])[0][layered] for name in varied})
    numbered = codes.groupby(varied, sort=False).ngroup().to_numpy()
    real = pd.unique(numbered[controls[layered] == REAL])
    drawn = np.isin(numbered, real[:MAX_ROWS])
    places: dict[int, _Place] = {}
    by_place: _ByPlace = {}
    for number, index in zip(numbered[drawn].tolist(), layered[drawn].tolist(), strict=True):
        if number not in places:
            cell = cells.record(index)
            places[number] = _Place(
                row=cell["row"],
                target_prompt=cell["target_prompt"],
                source_positions=tuple(as_list(cell["source_position"])),
                target_positions=tuple(as_list(cell["target_position"])),
                target_layer=None if axis else cell["target_layer"],
                scale=cell.get("scale"),
            )
        # setdefault keeps the first of several noise samples.
        by_place.setdefault((controls[index], places[number]), {}).setdefault(layers[index], index)
    return by_place, len(real)


def _flat(table: pd.DataFrame) -> _Flat:
    """Arrange the indices of cells that read no layer."""
    flat: _Flat = {}
    at = np.flatnonzero(table["source_layer"].isna().to_numpy())
    rows = table["row"].iloc[at].tolist()
    for index, control, row in zip(at.tolist(), control_names(table)[at], rows, strict=True):
        flat.setdefault(control, {}).setdefault(row, []).append(index)
    return flat


def _names(cells: Cells, *, first: Mapping[_Place, int]) -> dict[_Place, str]:
    """Name each place by the parts that distinguish it from the others; `first` has a cell of each place."""
    n_rows = len({place.row for place in first})
    many_positions = len({(place.row, place.source_positions) for place in first}) > n_rows
    many_targets = len({(place.row, place.target_prompt) for place in first}) > n_rows
    many_scales = len({place.scale for place in first}) > 1
    many_layers = len({place.target_layer for place in first}) > 1
    prompts = _prompts({index: cells.record(index)["source_prompt"] for index in first.values()})
    names = {}
    for place, index in first.items():
        parts = [prompts[index]] if n_rows > 1 or not many_positions else []
        if many_positions:
            parts.append(tokens_at(cells.record(index), width=LABEL_WIDTH))
        if many_targets:
            parts.append(f"→ {shorten(place.target_prompt, width=_PROMPT_WIDTH, tail=True)}")
        if many_layers:
            parts.append(f"→ {layer_name(place.target_layer)}")
        if many_scales:
            parts.append(f"x {place.scale:g}")
        names[place] = " ".join(parts)
    return names


def _prompts(prompts: Mapping[int, str]) -> dict[int, str]:
    """Shorten prompts to their ends, or to their beginnings if these distinguish more of them."""
    # Ends are preferred, because a state is usually read at the last token.
    ends, starts = (
        {index: shorten(text, width=_PROMPT_WIDTH, tail=tail).strip() for index, text in prompts.items()}
        for tail in (True, False)
    )
    return ends if len(set(ends.values())) >= len(set(starts.values())) else starts
