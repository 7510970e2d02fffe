"""The cells as JSON, for the table that the page itself searches and sorts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from patchscope_nn.analysis.statistics import is_null
from patchscope_nn.report.figures.cell_text import odds
from patchscope_nn.report.figures.table import as_list, reads_sink
from patchscope_nn.report.figures.text import token, visible
from patchscope_nn.spec import kinds_in

if TYPE_CHECKING:
    import pandas as pd

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
    columns = list(_columns(table.to_dict("records"), metrics=metrics, derived=derived))
    for limit in _TEXT_LIMITS:
        columns = [_cut(column, limit=limit) for column in columns]
        packed = script_json({"columns": list(map(_pooled, columns)), "limit": limit})
        if len(packed.encode("utf-8", errors="replace")) <= TABLE_BYTES:
            break
    return packed


def _cut(column: Column, *, limit: int) -> Column:
    """Cut the texts of a column to `limit` characters and an ellipsis."""
    if column["kind"] != "text":
        return column
    # One more character is allowed: the ellipsis of an earlier cut.
    cut = [text if len(text) <= limit + 1 else f"{text[:limit]}…" for text in column["values"]]
    return column | {"values": cut}


def _pooled(column: Column) -> Column:
    values = column["values"]
    pool = {value: index for index, value in enumerate(dict.fromkeys(values))}
    if column["kind"] != "text" or 2 * len(pool) > len(values):
        return column
    return column | {"pool": list(pool), "values": [pool[value] for value in values]}


def _columns(records: Sequence[Cell], *, metrics: Sequence[str], derived: Sequence[str]) -> Iterator[Column]:
    """Yield the columns of the table on the page; `detail` columns appear when a cell is opened."""
    names = list(records[0]) if records else []

    def texts(name: str, *, detail: bool = True) -> Column:
        values = [_quoted_texts(record.get(name)) for record in records]
        return _column(name.replace("_", " "), values, detail=detail)

    def counts(name: str, *, label: str = "", kind: str = "number", detail: bool = False) -> Column:
        values = [_number(record.get(name)) for record in records]
        return _column(label or name, values, kind=kind, detail=detail)

    if "run" in names:
        yield texts("run", detail=False)
    yield counts("row")
    yield texts("control", detail=False)
    yield texts("source_prompt", detail=False)
    yield _column("token read", [_quoted(record, side="source") for record in records])
    yield counts("source_layer", label="source layer", kind="layer")
    yield counts("target_layer", label="target layer", kind="layer")
    for name in ("scale", "sample"):
        if len({record.get(name) for record in records}) > 1:
            yield counts(name)
    yield _column("answer", list(map(cell_answer, records)))
    yield from (counts(name) for name in metrics)
    yield from (texts(name, detail=False) for name in derived if name not in metrics)
    yield _column("note", list(map(_note, records)))
    yield texts("target_prompt")
    yield _column("token written", [_quoted(record, side="target") for record in records], detail=True)
    yield _column("most likely", ["  ".join(odds(record)) for record in records], detail=True)
    for kind in kinds_in(names):
        for name in kind.details:
            if name in names and name not in metrics:
                number = kind.columns[name] in ("number", "integer")
                yield counts(name, detail=True) if number else texts(name)
    yield from (texts(name) for name in _TEXTS if name in names)


def _column(label: str, values: list[Any], *, kind: str = "text", detail: bool = False) -> Column:
    return {"label": label, "kind": kind, "detail": detail, "values": values}


def _number(value: Any) -> float | int | None:
    """Return a number of four digits for JSON, or None for a value that is not a finite number."""
    if is_null(value) or isinstance(value, str) or not math.isfinite(float(value)):
        return None
    number = float(f"{float(value):.4g}")
    return int(number) if number.is_integer() else number


def _quoted(cell: Cell, *, side: str) -> str:
    """Return the tokens of one side with their positions, such as `'Wales' 5`."""
    tokens, positions = as_list(cell.get(f"{side}_token")), as_list(cell.get(f"{side}_position"))
    return ", ".join(f"{token(text)} {place}" for text, place in zip(tokens, positions, strict=False))


def cell_answer(cell: Cell) -> str:
    """Return a cell's top token, generated text or choice; empty if it has none."""
    kinds = (kind for kind in kinds_in(cell) if as_list(cell.get(kind.says)))
    kind = next(kinds, None)
    if kind is None:
        return ""
    answer = as_list(cell[kind.says])[0]
    return token(answer) if kind.columns[kind.says] == "texts" else _text(answer)


def _quoted_texts(value: Any) -> str:
    """Return a text as it is, or several texts in quotes."""
    values = as_list(value)
    return " ".join(map(token, values)) if not isinstance(value, str) and values else _text(value)


def _text(value: Any) -> str:
    """Return text for the table, with control characters other than line breaks as signs."""
    length = _TEXT_LIMITS[0] + 2  # enough for `_cut` to detect a longer text
    return "" if is_null(value) else visible(str(value)[:length], keep="\n")


def _note(cell: Cell) -> str:
    notes = ["failed"] if not is_null(cell.get("error")) else []
    return ", ".join([*notes, "position 0: attention sink"] if reads_sink(cell) else notes)
