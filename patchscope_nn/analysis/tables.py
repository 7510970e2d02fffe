"""Results as a tidy table: one row per cell, with the same column order in every run.

The control is null for patched cells. Layers and positions are resolved: layers are blocks counted from 0,
and -1 is the input of block 0. Positions count from the left, and are lists because several tokens may be
patched together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from patchscope_nn.metrics import ColumnUse, MetricUse, compute_columns, compute_metrics
from patchscope_nn.spec import ColumnType, Readout, readout_kinds
from patchscope_nn.spec.encoding import decode
from patchscope_nn.sweep import Cell, Sweep

PLACES = (
    *("row", "control", "source_prompt", "source_position", "source_token", "source_layer"),
    *("target_prompt", "target_position", "target_token", "target_layer"),
    *("source_model", "target_model", "mapping", "scale", "sample"),
)
_TEXTS_KEPT = 2**15
_ROWS_AT_ONCE = 1000


def columns_of(readout: Readout, uses: Sequence[MetricUse], derived: Sequence[ColumnUse] = ()) -> list[str]:
    """Return the names of a run's columns, in order."""
    metrics = [use.name for use in uses if use.name not in readout.given]
    return [*PLACES, *readout.given, *(use.name for use in derived), *metrics, "error"]


class _Tokens:
    """Decode token ids, as `spec.Tokens` describes; the texts of single tokens are cached."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.token = lru_cache(maxsize=_TEXTS_KEPT)(lambda token_id: decode([token_id], tokenizer))

    def text(self, ids: Sequence[int]) -> str:
        return decode(ids, self._tokenizer)


class Tabulator:
    """Build the rows of a run's table; `tokenizer` is the target model's, `derived` the users' columns."""

    def __init__(
        self,
        sweep: Sweep,
        uses: Sequence[MetricUse],
        *,
        tokenizer: Any,
        mapping: str,
        derived: Sequence[ColumnUse] = (),
    ) -> None:
        self.sweep, self.uses, self.mapping, self.derived = sweep, uses, mapping, derived
        self._tokens = _Tokens(tokenizer)

    def row(self, cell: Cell, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Build the row of one cell from the values that its readout returned inside the context.

        Returns:
            The columns of `columns_of`, by name. If a user's function fails, its column is None, `error` says
            why, and the other columns are kept.
        """
        if "not_finite" in raw:
            return self.failed(cell, self._not_finite(cell, raw["not_finite"]))
        texts, row = self.sweep.entries[cell.entry].choices, self.sweep.rows[cell.row]
        readings = self.sweep.scope.readout.tabulate(raw, self._tokens, texts)
        columns = {**self._places(cell), **readings}
        derived = compute_columns(self.derived, columns, row)
        columns |= derived.values
        metrics = compute_metrics(self.uses, columns, row)
        error = " ".join([*derived.problems, *metrics.problems]) or None
        return {**columns, **metrics.values, "error": error}

    def _not_finite(self, cell: Cell, where: str) -> str:
        """Say why a cell has no numbers: where the first value that is not finite occurred."""
        source, target = (f"{info.name} ({info.dtype})" for info in (self.sweep.source, self.sweep.target))
        if where == "read":
            layer = self._places(cell)["source_layer"]
            place = "the embedding" if layer is None or layer < 0 else f"layer {layer}"
            reason = f"the hidden state that was read is not finite: {place} of {source}"
        elif where == "written":
            return (
                "the state that was written is not finite, although the state that was read is: see mapping "
                f"{self.mapping}, scale {cell.scale:g}, write {self.sweep.scope.target.mode}."
            )
        elif where == "replaced":
            reason = f"the hidden state that the write changes is not finite: {target}"
        elif where == "compared":
            run = "the logits or the replaced state of a run without the patch"
            reason = f"the reference is not finite: {run}, of {source} or {target}"
        else:
            patched = "" if cell.target_layer is None else ", although the state that was written is"
            reason = f"the logits of {target} are not finite{patched}"
        return f"{reason}. Another dtype may help."

    def failed(self, cell: Cell, reason: str) -> dict[str, Any]:
        """Build the row of a cell that has no result."""
        names = columns_of(self.sweep.scope.readout, self.uses, self.derived)
        return {**dict.fromkeys(names), **self._places(cell), "error": reason}

    def _places(self, cell: Cell) -> dict[str, Any]:
        sweep, read = self.sweep, cell.source_positions
        target = sweep.target_prompts[cell.target_prompt]
        tokens = None
        if isinstance(cell.source, int) and read is not None:  # a vector from a file has no tokens
            tokens = [sweep.source_prompts[cell.source].tokens[index] for index in read]
        return {
            "row": cell.row,
            "control": cell.control,
            "source_prompt": None if cell.source is None else sweep.source_text(cell.source),
            "source_position": None if read is None or tokens is None else list(read),
            "source_token": tokens,
            "source_layer": None if cell.source_layer is None else cell.source_layer + sweep.shifts[0],
            "target_prompt": target.text,
            "target_position": list(cell.target_positions),
            "target_token": [target.tokens[index] for index in cell.target_positions],
            "target_layer": None if cell.target_layer is None else cell.target_layer + sweep.shifts[1],
            "source_model": sweep.source.name,
            "target_model": sweep.target.name,
            "mapping": self.mapping,
            "scale": cell.scale,
            "sample": cell.sample,
        }


def frame(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """Convert rows to a pandas DataFrame with the run's columns; layers are nullable integers."""
    import pandas as pd

    table = pd.DataFrame({name: [row.get(name) for row in rows] for name in names}, columns=list(names))
    for name in ("source_layer", "target_layer"):
        table[name] = table[name].astype("Int64")
    for name in ("control", "error"):
        table[name] = table[name].astype(object).where(table[name].notna(), None)
    return table


def light_frame(rows: Iterable[Mapping[str, Any]], names: Sequence[str], *, metrics: Sequence[str]) -> Any:
    """Convert rows to a DataFrame that keeps places, metrics and errors, and leaves the other columns empty.

    Equal texts and lists are stored once, so that a hundred thousand cells take about 20 MB.
    """
    kept = [name for name in names if name in (*PLACES, "error") or name in metrics]
    texts: dict[str, str] = {}
    lists: dict[tuple[Any, ...], list[Any]] = {}

    def shared(value: Any) -> Any:
        if isinstance(value, str):
            return texts.setdefault(value, value)
        return lists.setdefault(tuple(value), value) if isinstance(value, list) else value

    return frame([{name: shared(row.get(name)) for name in kept} for row in rows], names)


#: The types of columns that no readout has; a column without a type is a metric, and holds numbers.
_TYPES: dict[str, ColumnType] = {
    **dict.fromkeys(("row", "source_layer", "target_layer", "sample"), "integer"),
    **dict.fromkeys(("source_position", "target_position"), "integers"),
    **dict.fromkeys(("source_token", "target_token"), "texts"),
    **dict.fromkeys(("control", "source_prompt", "target_prompt", "source_model", "target_model"), "text"),
    **dict.fromkeys(("mapping", "error", "probe_choice"), "text"),
}


def arrow_schema(names: Sequence[str], kinds: Mapping[str, ColumnType]) -> Any:
    """Return the pyarrow schema of a run's columns, which all parts of a table share."""
    import pyarrow as pa

    types = {name: kind for readout in readout_kinds().values() for name, kind in readout.columns.items()}
    types |= {**_TYPES, **kinds}
    arrow = {
        "text": pa.string(),
        "number": pa.float64(),
        "integer": pa.int64(),
        "texts": pa.list_(pa.string()),
        "numbers": pa.list_(pa.float64()),
        "integers": pa.list_(pa.int64()),
        "states": pa.list_(pa.list_(pa.float32())),
    }
    return pa.schema([(name, arrow[types.get(name, "number")]) for name in names])


def write_parquet(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    file: Path,
    *,
    kinds: Mapping[str, ColumnType] = {},
) -> None:
    """Write a table part by part, so that it is never in memory as a whole; `rows` may be read lazily.

    `kinds` has the kind of each column computed by a user's function, as in `metrics.Column`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, remaining = arrow_schema(names, kinds), iter(rows)
    parts = (
        pa.Table.from_pandas(frame(chunk, names), schema=schema, preserve_index=False)
        for chunk in iter(lambda: list(islice(remaining, _ROWS_AT_ONCE)), [])
    )
    first = next(parts, schema.empty_table())
    with pq.ParquetWriter(file, first.schema) as writer:
        for part in chain((first,), parts):
            writer.write_table(part)
