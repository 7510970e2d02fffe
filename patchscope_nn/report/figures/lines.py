"""The lines of a text heatmap: which cells stand together, in what order, and what each line is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from patchscope_nn.analysis.statistics import REAL, is_null, numbers
from patchscope_nn.report.figures.said import LABEL_WIDTH, Cells
from patchscope_nn.report.figures.table import FLAT_LAYERS, NO_LAYER, as_list, layer_axis, layer_name
from patchscope_nn.report.figures.text import shorten

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
    scale: Any


class _Arranged(NamedTuple):
    """Indices of cells: of each (control, place) by layer; of each control that reads no layer by row.

    A row may have several of the latter, for its target prompts or its positions, in order.
    """

    places: dict[tuple[str, _Place], dict[float, int]]
    flat: dict[str, dict[Any, list[int]]]


def text_lines(table: pd.DataFrame, *, cells: Cells) -> tuple[list[Line], int]:
    """The lines from the top down, and how many rows there are in all; at most `MAX_ROWS` are kept.

    Cells of a control that reads no layer share one line on top where they all look the same; else each
    stands on the left of its row's line.

    Args:
        table: The tidy table.
        cells: The same, as it is shown.
    """
    places, flat = _arrange(table, cells=cells)
    real = [place for control, place in places if control == REAL]
    kept = {place: places[REAL, place] for place in real[:MAX_ROWS]}
    names = _names(cells, first={place: next(iter(found.values())) for place, found in kept.items()})
    columns = {layer for found in kept.values() for layer in found}
    top = []
    for control, rows in flat.items():
        indices = [index for found in rows.values() for index in found]
        if cells.alike(indices) or not kept:
            spots = columns or {NO_LAYER}
            top.append(Line(control, dict.fromkeys(spots, indices[0])))
            continue
        for place, found in kept.items():
            if place.row in rows:
                beside = _closest(place, [(index, cells.records[index]) for index in rows[place.row]])
                found[FLAT_LAYERS.get(control, NO_LAYER)] = beside
    lines = top + [Line(names[place], found) for place, found in kept.items()]
    controls = [
        Line(f"{control}: {names[place]}", found)
        for (control, place), found in places.items()
        if control != REAL and place in names
    ]
    fits = len(lines) + len(controls) <= _MAX_LINES_WITH_CONTROLS
    return lines + controls if fits else lines, len(real)


def _closest(place: _Place, found: Sequence[tuple[int, Mapping[Any, Any]]]) -> int:
    """Of a row's cells that read no layer, that of this target position and prompt, or the nearest to it."""

    def fits(one: tuple[int, Mapping[Any, Any]]) -> tuple[bool, bool]:
        positions = tuple(as_list(one[1]["target_position"]))
        return positions == place.target_positions, one[1]["target_prompt"] == place.target_prompt

    return max(found, key=fits)[0]


def _arrange(table: pd.DataFrame, *, cells: Cells) -> _Arranged:
    axis = layer_axis(table)
    layers = numbers(table[axis or "source_layer"])
    found = _Arranged({}, {})
    for index, cell in enumerate(cells.records):
        control = REAL if is_null(cell["control"]) else str(cell["control"])
        if is_null(cell["source_layer"]):
            found.flat.setdefault(control, {}).setdefault(cell["row"], []).append(index)
            continue
        place = _Place(
            row=cell["row"],
            target_prompt=cell["target_prompt"],
            source_positions=tuple(as_list(cell["source_position"])),
            target_positions=tuple(as_list(cell["target_position"])),
            target_layer=None if axis else cell["target_layer"],
            scale=cell.get("scale"),
        )
        # Of several samples of the noise the first is shown.
        found.places.setdefault((control, place), {}).setdefault(layers[index], index)
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
    many_scales = len({place.scale for place in first}) > 1
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
        if many_scales:
            parts.append(f"x {place.scale:g}")
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
