"""The cells as JSON, for the table that the page itself searches and sorts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from patchscope_nn.analysis.statistics import is_null, numbers
from patchscope_nn.report.figures.table import as_list, coded, sinks
from patchscope_nn.report.figures.text import token, visible
from patchscope_nn.spec import kinds_in

TABLE_BYTES = 2_000_000  # with plotly's 4.8 MB and the figures, a report stays under 8 MB
_TEXT_LIMITS = (4000, 1000, 300, 120, 60)
_TEXTS = ("mapping", "source_model", "target_model", "error")

Cell = Mapping[Any, Any]
Column = dict[str, Any]


def script_json(value: object) -> Markup:
    """Write JSON that is safe in a script element: without `<`, it cannot contain `</script>` or `<!--`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped for its place in the two lines above


def cells_json(table: pd.DataFrame, *, metrics: Sequence[str], derived: Sequence[str] = ()) -> Markup:
    """Write the cells for the table on the page, with texts shortened until all fit into `TABLE_BYTES`.

    Returns:
        {"columns": [{label, kind, detail, pool?, values}], "limit": characters of a text}. The values of a
        column with a pool are indices into it, because prompts and tokens repeat from cell to cell.
    """
    columns = list(_columns(table, metrics=metrics, derived=derived)) if len(table.columns) else []
    for limit in _TEXT_LIMITS:
        columns = [_cut(column, limit=limit) for column in columns]
        packed = script_json({"columns": list(map(_listed, columns)), "limit": limit})
        if len(packed.encode("utf-8", errors="replace")) <= TABLE_BYTES:
            break
    return packed


def _cut(column: Column, *, limit: int) -> Column:
    """Cut the texts of a column to `limit` characters and an ellipsis."""
    if column["kind"] != "text":
        return column
    # One more character is allowed: the ellipsis of an earlier cut.
    cut = [text if len(text) <= limit + 1 else f"{text[:limit]}…" for text in column["pool"]]
    return column | {"pool": cut}


def _listed(column: Column) -> Column:
    """Return a column of texts with its pool, or without one if there are nearly as many texts as cells."""
    if column["kind"] != "text":
        return column
    known: dict[str, int] = {}
    index = np.array([known.setdefault(text, len(known)) for text in column["pool"]], np.int64)
    values = index[column["values"]].tolist()
    if 2 * len(known) > len(values):
        pool = list(known)
        return {name: column[name] for name in column if name != "pool"} | {
            "values": [pool[value] for value in values]
        }
    return column | {"pool": list(known), "values": values}


def _columns(table: pd.DataFrame, *, metrics: Sequence[str], derived: Sequence[str]) -> Iterator[Column]:
    """Yield the columns of the table on the page; `detail` columns appear when a cell is opened.

    Texts are made once for each distinct value: a column of texts is a pool, and an index for each cell.
    """
    names = list(map(str, table.columns))

    def texts(name: str, *, detail: bool = True) -> Column:
        return _texts(name.replace("_", " "), *_pool(_values(table, name), _quoted_texts), detail=detail)

    def counts(name: str, *, label: str = "", kind: str = "number", detail: bool = False) -> Column:
        values = _rounded(numbers(table[name])) if name in names else [None] * len(table)
        return {"label": label or name, "kind": kind, "detail": detail, "values": values}

    if "run" in names:
        yield texts("run", detail=False)
    yield counts("row")
    yield texts("control", detail=False)
    yield texts("source_prompt", detail=False)
    yield _texts("token read", *_places(table, side="source"), detail=False)
    yield counts("source_layer", label="source layer", kind="layer")
    yield counts("target_layer", label="target layer", kind="layer")
    for name in ("scale", "sample"):
        if name in names and len(table[name].unique()) > 1:
            yield counts(name)
    yield _texts("answer", *_pool(answers(table), lambda answer: answer), detail=False)
    yield from (counts(name) for name in metrics)
    yield from (texts(name, detail=False) for name in derived if name not in metrics)
    yield _texts("note", *_notes(table), detail=False)
    yield texts("target_prompt")
    yield _texts("token written", *_places(table, side="target"), detail=True)
    yield _texts("most likely", *_pool(_odds(table), lambda line: line), detail=True)
    for kind in kinds_in(names):
        for name in kind.details:
            if name in names and name not in metrics:
                number = kind.columns[name] in ("number", "integer")
                yield counts(name, detail=True) if number else texts(name)
    yield from (texts(name) for name in _TEXTS if name in names)


def _texts(label: str, values: np.ndarray, pool: list[str], *, detail: bool) -> Column:
    return {"label": label, "kind": "text", "detail": detail, "pool": pool, "values": values}


def _values(table: pd.DataFrame, name: str) -> Sequence[Any] | pd.Series:
    return table[name] if name in table.columns else [None] * len(table)


def _pool(values: Sequence[Any] | pd.Series, text: Callable[[Any], str]) -> tuple[np.ndarray, list[str]]:
    """Return the index of each cell's text, (cell,), and the texts, made of the distinct values."""
    codes, distinct = coded(values)
    return codes, list(map(text, distinct))


def _rounded(values: np.ndarray) -> list[float | int | None]:
    """Return numbers of four digits for JSON, with None for values that are not finite."""
    known = np.isfinite(values)
    sizes = np.abs(np.where(known & (values != 0), values, 1.0))
    digits = 3 - np.floor(np.log10(sizes))
    small = digits > 0  # a power of ten divides exactly, and 0.1 does not
    unit = 10.0 ** np.minimum(np.abs(digits), 300)
    shifted = np.rint(np.where(small, values * unit, values / unit))
    rounded = np.where(small, shifted / unit, shifted * unit)[known]
    whole = bool((rounded == np.floor(rounded)).all()) and bool((np.abs(rounded) < 2**53).all())
    listed = np.full(len(values), None, object)
    listed[known] = rounded.astype(np.int64) if whole else rounded
    return list(listed.tolist())


def _places(table: pd.DataFrame, *, side: str) -> tuple[np.ndarray, list[str]]:
    """Return the tokens of one side with their positions, such as `'Wales' 5`: indices and texts."""
    tokens, texts = coded(_values(table, f"{side}_token"))
    positions, places = coded(_values(table, f"{side}_position"))
    index, pairs = pd.factorize(tokens * max(1, len(places)) + positions)
    pool = []
    for at, place in zip(*np.divmod(pairs, max(1, len(places))), strict=True):
        pair = zip(as_list(texts[at]), as_list(places[place]), strict=False)
        pool.append(", ".join(f"{token(text)} {number}" for text, number in pair))
    return index, pool


def answers(table: pd.DataFrame) -> list[str]:
    """Return each cell's top token, generated text or choice; empty if it has none."""
    answers = [""] * len(table)
    for kind in kinds_in(table.columns)[::-1]:  # the first kind that says something wins
        if not kind.says:
            continue
        says = kind.columns[kind.says]
        first_texts = [next(iter(as_list(value)), None) for value in table[kind.says].tolist()]
        codes, pool = _pool(first_texts, token if says == "texts" else _text)
        answers = [
            answer if value is None else pool[code]
            for answer, value, code in zip(answers, first_texts, codes.tolist(), strict=True)
        ]
    return answers


def _odds(table: pd.DataFrame) -> list[str]:
    """Return each cell's likely answers with their probabilities, such as `' Paris' 0.93  ' the' 0.01`."""
    lines = [""] * len(table)
    for kind in kinds_in(table.columns):
        if kind.odds is None or not set(kind.odds) <= set(table.columns):
            continue
        options, probabilities = (list(map(as_list, table[name].tolist())) for name in kind.odds)
        codes, pool = _pool(list(chain.from_iterable(options)), token)
        quoted = map(pool.__getitem__, codes.tolist())
        more = ["  ".join(_paired(quoted, *pair)) for pair in zip(options, probabilities, strict=True)]
        lines = ["  ".join(filter(None, both)) for both in zip(lines, more, strict=True)]
    return lines


def _paired(quoted: Iterator[str], options: list[Any], probabilities: list[float]) -> Iterable[str]:
    """Return a cell's options with their probabilities; `quoted` continues with its options."""
    texts = [next(quoted) for _ in options]
    return [f"{text} {value:.3g}" for text, value in zip(texts, probabilities, strict=False)]


def _quoted_texts(value: Any) -> str:
    """Return a text as it is, or several texts in quotes."""
    values = as_list(value)
    return " ".join(map(token, values)) if not isinstance(value, str) and values else _text(value)


def _text(value: Any) -> str:
    """Return text for the table, with control characters other than line breaks as signs."""
    length = _TEXT_LIMITS[0] + 2  # enough for `_cut` to detect a longer text
    return "" if is_null(value) else visible(str(value)[:length], keep="\n")


def _notes(table: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Return the note of each cell: indices and texts."""
    sink = "position 0: attention sink"
    failed = table["error"].notna().to_numpy() if "error" in table.columns else np.zeros(len(table), bool)
    return failed + 2 * sinks(table), ["", "failed", sink, f"failed, {sink}"]
