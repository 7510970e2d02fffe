"""The lines of a text heatmap: which cells stand together, in what order, and what each line is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from patchscope_nn.plots.said import LABEL_WIDTH, Cells
from patchscope_nn.plots.table import NO_LAYER, as_list, layer_axis, layer_name
from patchscope_nn.plots.text import shorten
from patchscope_nn.statistics import REAL, is_null, numbers

MAX_ROWS = 40
_MAX_LINES_WITH_CONTROLS = 20
_PROMPT_WIDTH = 26


class Line(NamedTuple):
    """One line of a text heatmap.

    Attributes:
        name: What stands beside it.
        cells: The index of its cell at each layer.
    """

    name: str
    cells: dict[float, int]


class _Place(NamedTuple):
    """What the cells of one line share; `target_layer` is None where layers across tell it."""

    row: Any
    target_prompt: str
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    target_layer: Any


class _Arranged(NamedTuple):
    """Indices of cells: of each (control, place) by layer, and the unpatched one of each (row, target)."""

    places: dict[tuple[str, _Place], dict[float, int]]
    unpatched: dict[tuple[Any, str], int]


def text_lines(table: pd.DataFrame, *, cells: Cells) -> tuple[list[Line], int]:
    """The lines from the top down, and how many rows there are in all; at most `MAX_ROWS` are kept.

    Unpatched cells that all look the same share one line on top; else each is a cell of its row's line.

    Args:
        table: The tidy table.
        cells: The same, as it is shown.
    """
    places, unpatched = _arrange(table, cells=cells)
    real = [place for control, place in places if control == REAL]
    kept = {place: places[REAL, place] for place in real[:MAX_ROWS]}
    names = _names(cells, first={place: next(iter(found.values())) for place, found in kept.items()})
    if cells.alike(list(unpatched.values())) or not kept:
        columns = {layer for found in kept.values() for layer in found} or {NO_LAYER}
        top = [Line("unpatched", dict.fromkeys(columns, index)) for index in list(unpatched.values())[:1]]
    else:
        top = []
        for place, found in kept.items():
            if place[:2] in unpatched:
                found[NO_LAYER] = unpatched[place[:2]]
    lines = top + [Line(names[place], found) for place, found in kept.items()]
    controls = [
        Line(f"{control}: {names[place]}", found)
        for (control, place), found in places.items()
        if control != REAL and place in names
    ]
    fits = len(lines) + len(controls) <= _MAX_LINES_WITH_CONTROLS
    return lines + controls if fits else lines, len(real)


def _arrange(table: pd.DataFrame, *, cells: Cells) -> _Arranged:
    axis = layer_axis(table)
    layers = numbers(table[axis or "source_layer"])
    found = _Arranged({}, {})
    for index, cell in enumerate(cells.records):
        row, prompt = cell["row"], cell["target_prompt"]
        if is_null(cell["source_layer"]):
            found.unpatched.setdefault((row, prompt), index)
            continue
        place = _Place(
            row=row,
            target_prompt=prompt,
            source_positions=tuple(as_list(cell["source_position"])),
            target_positions=tuple(as_list(cell["target_position"])),
            target_layer=None if axis else cell["target_layer"],
        )
        control = REAL if is_null(cell["control"]) else cell["control"]
        found.places.setdefault((control, place), {})[layers[index]] = index
    return found


def _names(cells: Cells, *, first: Mapping[_Place, int]) -> dict[_Place, str]:
    """A name for each place, of the parts that tell it from the others.

    Args:
        cells: The table's cells.
        first: One cell of each place.
    """
    n_rows = len({place.row for place in first})
    many_positions = len({(place.row, place.source_positions) for place in first}) > n_rows
    many_targets = len({(place.row, place.target_prompt) for place in first}) > n_rows
    many_layers = len({place.target_layer for place in first}) > 1
    prompts = _prompts({index: cells.records[index]["source_prompt"] for index in first.values()})
    names = {}
    for place, index in first.items():
        parts = [prompts[index]] if n_rows > 1 or not many_positions else []
        if many_positions:
            words = " ".join(str(text).strip() for text in as_list(cells.records[index]["source_token"]))
            at = ", ".join(map(str, place.source_positions))
            parts.append(f"{shorten(words, width=LABEL_WIDTH)} ({at})")
        if many_targets:
            parts.append(f"→ {shorten(place.target_prompt, width=_PROMPT_WIDTH, tail=True)}")
        if many_layers:
            parts.append(f"→ {layer_name(place.target_layer)}")
        names[place] = " ".join(parts)
    return names


def _prompts(prompts: Mapping[int, str]) -> dict[int, str]:
    """Prompts in a few letters: their ends, or where all end alike their beginnings, which then tell more."""
    # The end of a prompt is what the state has just read.
    ends, starts = (
        {index: shorten(text, width=_PROMPT_WIDTH, tail=tail).strip() for index, text in prompts.items()}
        for tail in (True, False)
    )
    return ends if len(set(ends.values())) >= len(set(starts.values())) else starts
