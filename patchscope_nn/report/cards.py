"""Cards of generated text: of each of the first data rows the best text, its reference and its controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patchscope_nn.analysis.statistics import is_higher_better
from patchscope_nn.metrics import MetricInfo
from patchscope_nn.report.figures import as_list, is_null, layer_name, numbers, token, visible
from patchscope_nn.spec import kinds_in

if TYPE_CHECKING:
    import pandas as pd

#: The data rows that have a card, and the longest text on one.
MAX_CARDS = 12
_LIMIT = 600
_LAYERS = ("source_layer", "target_layer")

Cell = Mapping[Any, Any]


class Said(NamedTuple):
    """One text of a card.

    Attributes:
        kind: `reference`, `patched`, or the control's name.
        where: What its kind is of: a data column, or layers.
        text: The text, visible.
        value: The metric, as text; empty where there is none.
    """

    kind: str
    where: str
    text: str
    value: str


class Card(NamedTuple):
    """One data row: its number, its source prompt with what was read of it, and its texts."""

    row: int
    prompt: str
    read: str
    texts: tuple[Said, ...]


def cards(
    table: pd.DataFrame,
    *,
    references: Sequence[Mapping[str, Any]] = (),
    metric: str | None = None,
    known: Mapping[str, MetricInfo] | None = None,
) -> list[Card]:
    """A card for each of the first rows of a run that generates text.

    The patched text is the best of its row by the metric; controls that read a layer stand at the same place.
    Without a metric it is that of the middle cell.

    Args:
        table: The tidy table; there are no cards where its readout gives no running text.
        references: Of each data row, from the first, the columns that its metrics compare with.
        metric: The metric column that says which text is best.
        known: Which way metrics are better, as in `statistics.best_over`.
    """
    column = next((kind.says for kind in kinds_in(table.columns) if kind.sentences), None)
    if column is None:
        return []
    table = table.rename(columns={column: "text"})
    made = []
    higher = metric is None or is_higher_better(metric, known)
    for row in list(dict.fromkeys(table["row"]))[:MAX_CARDS]:
        own = table[table["row"] == row]
        given = references[int(row)] if int(row) < len(references) else {}
        card = _card(own, row=int(row), given=given, metric=metric, higher=higher)
        made += [card] if card else []
    return made


def _card(
    own: pd.DataFrame, *, row: int, given: Mapping[str, Any], metric: str | None, higher: bool
) -> Card | None:
    real = own[own["control"].isna() & own["text"].notna()]
    if real.empty:
        return None
    values = numbers(real[metric]) if metric else np.full(len(real), np.nan)
    scores = np.where(np.isfinite(values), values if higher else -values, -np.inf)
    best = real.iloc[int(scores.argmax()) if np.isfinite(scores).any() else len(real) // 2].to_dict()
    texts = [Said("reference", name, _text(value), "") for name, value in given.items()]
    chosen = f"best of {len(real):,}" if metric and len(real) > 1 else ""
    texts.append(_said(best, kind="patched", metric=metric, aside=chosen))
    for control in dict.fromkeys(own["control"].dropna()):
        beside = own[(own["control"] == control) & own["text"].notna()]
        found = _beside(best, beside.to_dict("records"))
        texts += [_said(found, kind=str(control), metric=metric)] if found else []
    tokens = " ".join(token(text) for text in as_list(best.get("source_token")))
    return Card(row, _text(best["source_prompt"]), tokens, tuple(texts))


def _beside(best: Cell, cells: Sequence[Cell]) -> Cell | None:
    """A control's cell at the place of the best, or where it reads no layer its first.

    Another row's state was read at that row's own position.
    """
    places = (*_LAYERS, "target_position", "target_prompt", "scale", "sample")
    there = [cell for cell in cells if all(_same(cell.get(name), best.get(name)) for name in places)]
    own = [cell for cell in there if _same(cell["source_position"], best["source_position"])]
    return next(iter(own or there or [cell for cell in cells if is_null(cell["source_layer"])]), None)


def _same(one: Any, other: Any) -> bool:
    return as_list(one) == as_list(other)


def _said(cell: Cell, *, kind: str, metric: str | None, aside: str = "") -> Said:
    value = cell.get(metric) if metric else None
    shown = "" if is_null(value) else f"{metric} {float(str(value)):.3g}"
    return Said(kind, ", ".join(filter(None, (*_place(cell), aside))), _text(cell["text"]), shown)


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
    """Text for the page, visible but for its line breaks, and cut."""
    shown = visible("" if is_null(value) else str(value)[: _LIMIT + 1], keep="\n")
    return f"{shown[:_LIMIT]}…" if len(shown) > _LIMIT else shown
