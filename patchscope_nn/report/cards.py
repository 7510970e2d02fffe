"""Cards of generated text: for each of the first data rows, its best text, reference and controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patchscope_nn.analysis.statistics import is_higher_better, is_null, numbers
from patchscope_nn.metrics import described
from patchscope_nn.report.figures.table import as_list, layer_name
from patchscope_nn.report.figures.text import token, visible
from patchscope_nn.spec import kinds_in

if TYPE_CHECKING:
    import pandas as pd

MAX_CARDS = 12
_LIMIT = 600  # characters of a text on a card
_LAYERS = ("source_layer", "target_layer")

Cell = Mapping[Any, Any]


class CardText(NamedTuple):
    """One text of a card: a reference, the patched text, or that of a control, with where it is from.

    `value` is the metric's value as text. Empty texts stand for missing ones.
    """

    kind: str
    where: str
    text: str
    value: str


class Card(NamedTuple):
    """The card of one data row: its source prompt, the source tokens that were read, and its texts."""

    row: int
    prompt: str
    read: str
    texts: tuple[CardText, ...]


def cards(table: pd.DataFrame, *, metric: str | None, manifest: Mapping[str, Any]) -> list[Card]:
    """Make a card for each of the first rows of a run that generates text.

    The patched text is the best of its row by the metric, or without a metric the text of the middle cell.
    Controls that read a layer are taken from the same place.
    """
    column = next((kind.says for kind in kinds_in(table.columns) if kind.sentences), None)
    if column is None:
        return []
    table = table.rename(columns={column: "text"})
    made = []
    higher = metric is None or is_higher_better(metric, described(manifest))
    references = manifest.get("references") or ()
    for row in list(dict.fromkeys(table["row"]))[:MAX_CARDS]:
        own = table[table["row"] == row]
        reference = references[int(row)] if int(row) < len(references) else {}
        card = _card(own, row=int(row), reference=reference, metric=metric, higher=higher)
        made += [card] if card else []
    return made


def _card(
    own: pd.DataFrame, *, row: int, reference: Mapping[str, Any], metric: str | None, higher: bool
) -> Card | None:
    real = own[own["control"].isna() & own["text"].notna()]
    if real.empty:
        return None
    values = numbers(real[metric]) if metric else np.full(len(real), np.nan)
    scores = np.where(np.isfinite(values), values if higher else -values, -np.inf)
    best = real.iloc[int(scores.argmax()) if np.isfinite(scores).any() else len(real) // 2].to_dict()
    texts = [CardText("reference", name, _text(value), "") for name, value in reference.items()]
    chosen = f"best of {len(real):,}" if metric and len(real) > 1 else ""
    texts.append(_card_text(best, kind="patched", metric=metric, aside=chosen))
    for control in dict.fromkeys(own["control"].dropna()):
        cells = own[(own["control"] == control) & own["text"].notna()]
        cell = _at_same_place(best, cells.to_dict("records"))
        texts += [_card_text(cell, kind=str(control), metric=metric)] if cell else []
    tokens = " ".join(token(text) for text in as_list(best.get("source_token")))
    return Card(row, _text(best["source_prompt"]), tokens, tuple(texts))


def _at_same_place(best: Cell, cells: Sequence[Cell]) -> Cell | None:
    """Return a control's cell at the place of the best cell, or its first cell if it reads no layer.

    The source position may differ: `shuffled` reads another row's state at that row's own position.
    """
    places = (*_LAYERS, "target_position", "target_prompt", "scale", "sample")
    there = [cell for cell in cells if all(_same(cell.get(name), best.get(name)) for name in places)]
    own = [cell for cell in there if _same(cell["source_position"], best["source_position"])]
    return next(iter(own or there or [cell for cell in cells if is_null(cell["source_layer"])]), None)


def _same(a: Any, b: Any) -> bool:
    return as_list(a) == as_list(b)


def _card_text(cell: Cell, *, kind: str, metric: str | None, aside: str = "") -> CardText:
    score = cell.get(metric) if metric else None
    value = "" if is_null(score) else f"{metric} {float(str(score)):.3g}"
    return CardText(kind, ", ".join(filter(None, (*_place(cell), aside))), _text(cell["text"]), value)


def _place(cell: Cell) -> Iterator[str]:
    source, target = (cell.get(name) for name in _LAYERS)
    if is_null(source):
        return
    same = is_null(target) or source == target
    yield f"layer {layer_name(float(str(source)))}" + ("" if same else f" → {layer_name(float(str(target)))}")
    scale = cell.get("scale")
    if not is_null(scale) and scale != 1:
        yield f"scale {scale:g}"


def _text(value: Any) -> str:
    """Return text for the page: cut to `_LIMIT`, with control characters other than line breaks as signs."""
    text = visible("" if is_null(value) else str(value)[: _LIMIT + 1], keep="\n")
    return f"{text[:_LIMIT]}…" if len(text) > _LIMIT else text
