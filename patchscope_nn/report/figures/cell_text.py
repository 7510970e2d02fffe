"""The texts of one cell in a figure: its label, the number that shades it, and its hover text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from patchscope_nn.analysis.statistics import is_null, numbers
from patchscope_nn.errors import InputError
from patchscope_nn.report.figures.table import as_list, layer_name, metric_columns, reads_sink
from patchscope_nn.report.figures.text import shorten, token, wrap
from patchscope_nn.spec import Readout, kinds_in

LABEL_WIDTH = 12
_SENTENCE_WIDTH = 20  # for generated text, which needs more room than a token
_PROMPT_WIDTH, _TEXT_WIDTH = 140, 300

Cell = Mapping[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A table's cells with the texts that figures show; cells are named by their index.

    `columns` has the values of each column. `kind` is the kind of readout, which answers in words. `shades`
    has the number that shades each cell, or NaN, and `scale` the name of that number; it is None if cells are
    not shaded.
    """

    columns: Mapping[str, Sequence[Any]]
    kind: type[Readout]
    shades: np.ndarray
    scale: str | None

    def record(self, index: int) -> Cell:
        """Return a cell's values by column."""
        return {name: values[index] for name, values in self.columns.items()}

    def label(self, index: int) -> str:
        """Return a cell's answer in a few characters; empty if the cell failed."""
        words = as_list(self.columns[self.kind.says][index])
        if not words or ("error" in self.columns and not is_null(self.columns["error"][index])):
            return ""
        text = str(words[0])
        if self.kind.sentences:
            # Few-shot prompts put a colon before each description, and the model repeats it.
            return shorten(text.strip(" ").removeprefix(":").strip(" "), width=_SENTENCE_WIDTH) or "(empty)"
        return shorten(text.strip(" "), width=LABEL_WIDTH) or ("␣" if text else "(empty)")

    def alike(self, indices: Sequence[int]) -> bool:
        """True if cells have the same label and, up to rounding, the same shade."""
        shades = self.shades[list(indices)]
        labels = {self.label(index) for index in indices}
        return len(labels) <= 1 and np.allclose(shades, shades[:1], rtol=0, atol=1e-4, equal_nan=True)

    def hover(self, index: int) -> str:
        """Return the hover text of a cell, escaped for plotly."""
        cell = self.record(index)
        return "<br>".join(map(wrap, (*_origin(cell), *_answer(cell, scale=self.scale))))


def read_cells(table: pd.DataFrame, *, value: str | None) -> Cells:
    """Read the cells of a table whose readout answers in words, shaded by `value` or what suits the readout.

    Raises:
        InputError: The readout does not answer in words, or the table has no column `value`.
    """
    kind = next((kind for kind in kinds_in(table.columns) if kind.says), None)
    if kind is None:
        raise InputError("This table has no text.", hint="Use the readout next_token, generate or choices.")
    shades, scale = _shades(table, kind, value=value)
    columns = {str(name): table[name].tolist() for name in table.columns}
    return Cells(columns=columns, kind=kind, shades=shades, scale=scale)


def _shades(table: pd.DataFrame, kind: type[Readout], *, value: str | None) -> tuple[np.ndarray, str | None]:
    """Return the number that shades each cell, with NaN for missing ones, and its name."""
    if value is not None and value not in table.columns:
        raise InputError(f"value={value!r} is not a column of this table.", hint="Use a numeric column.")
    if value is None and kind.odds is not None and kind.odds[1] in table.columns:
        columns = (map(as_list, table[name].tolist()) for name in (*kind.odds, kind.says))
        return np.array([*map(_probability, *columns)], dtype=float), "probability"
    name = value or next(iter(metric_columns(table)), None)
    return (np.full(len(table), np.nan), None) if name is None else (numbers(table[name]), name)


def _probability(options: Sequence[Any], probabilities: Sequence[float], answers: Sequence[Any]) -> float:
    """Return the probability of a cell's first answer; NaN if it has none."""
    pairs = zip(options, probabilities, strict=False)
    return next((probability for option, probability in pairs if option in answers[:1]), np.nan)


def odds(cell: Cell) -> list[str]:
    """Return the likely answers with their probabilities, such as `' Paris' 0.93`."""
    columns = [kind.odds for kind in kinds_in(cell) if kind.odds is not None]
    return [
        f"{token(text)} {probability:.3g}"
        for names in columns
        for text, probability in zip(*(as_list(cell.get(name)) for name in names), strict=False)
    ]


def _origin(cell: Cell) -> Iterator[str]:
    """Yield the lines that say where a cell's state was read and where it was written."""
    patched = not is_null(cell["source_layer"])
    if not is_null(cell["control"]):
        yield f"control: {cell['control']}"
    yield f"source: {shorten(cell['source_prompt'], width=_PROMPT_WIDTH, tail=True)}"
    if patched:
        yield f"read: {_place(cell, side='source')}"
    yield f"{'written to' if patched else 'target'}: {_place(cell, side='target')}"
    if reads_sink(cell):
        yield "position 0 is an attention sink: its state carries little about the prompt"


def tokens_at(cell: Cell, *, width: int) -> str:
    """Name the source tokens of a cell with their positions, such as `Wales (5)`."""
    words = " ".join(str(text).strip() for text in as_list(cell["source_token"]))
    return f"{shorten(words, width=width)} ({', '.join(map(str, as_list(cell['source_position'])))})"


def _place(cell: Cell, *, side: str) -> str:
    tokens = " ".join(token(text) for text in as_list(cell.get(f"{side}_token")))
    at = ", ".join(map(str, as_list(cell.get(f"{side}_position"))))
    layer = as_list(cell.get(f"{side}_layer"))
    return f"{tokens or 'token'} at position {at}{f', layer {layer_name(*layer)}' if layer else ''}"


def _answer(cell: Cell, *, scale: str | None) -> Iterator[str]:
    """Yield the lines with a cell's readout: probabilities, numbers and text."""
    likely = odds(cell)[:10]
    if likely:
        yield f"most likely: {', '.join(likely)}"
    for name in dict.fromkeys((scale, *(name for kind in kinds_in(cell) for name in kind.details))):
        number = cell.get(name)
        if isinstance(number, int | float) and not is_null(number):
            yield f"{name}: {number:.3g}"
    sentences = (kind.says for kind in kinds_in(cell) if kind.sentences)
    for name in (*sentences, "error"):
        if not is_null(cell.get(name)):
            yield f"{name}: {shorten(cell[name], width=_TEXT_WIDTH)}"
