"""Turns what passes return into columns of the run's table, a pass at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from patchscope_nn._util.ragged import Ints
from patchscope_nn.analysis.cell_rows import CELL
from patchscope_nn.analysis.tables import PLACES, arrow_schema, columns_of
from patchscope_nn.backends import PassResult
from patchscope_nn.metrics import ColumnUse, MetricUse, compute
from patchscope_nn.spec.encoding import decode
from patchscope_nn.sweep import CellBlock, Flags, Sweep

_TEXTS_KEPT = 2**15


class _Tokens:
    """Decodes token ids, as `spec.Tokens` describes; the texts of single tokens are cached."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token = lru_cache(maxsize=_TEXTS_KEPT)(lambda token_id: decode([token_id], tokenizer))

    def tokens(self, ids: Any) -> pa.Array:
        ids = np.asarray(ids)
        distinct, index = np.unique(ids, return_inverse=True)
        texts = pa.array([self._token(token_id) for token_id in distinct.tolist()], pa.string())
        flat = texts.take(pa.array(index.ravel()))
        return flat if ids.ndim == 1 else _lists(flat, ids.shape)

    def texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [decode(row, self._tokenizer) for row in ids]


class Tabulator:
    """Makes the columns of a run's table.

    Args:
        sweep: The sweep.
        uses: The metrics.
        tokenizer: The target model's.
        mapping: The mapping's name.
        derived: The columns of users' functions.
    """

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
        kinds = {use.name: use.column.kind for use in derived if use.column is not None}
        self._schema = arrow_schema(columns_of(sweep.scope.readout, uses, derived), kinds)

    def table(self, results: Sequence[PassResult], failed: Mapping[int, str]) -> pa.Table:
        """Make the rows of the cells of some passes, in ascending order.

        Args:
            results: What the passes have returned.
            failed: For each cell that has no result, why.

        Returns:
            The columns of `columns_of`, and `CELL`. If a user's function fails, its column is null, `error`
            says why, and the other columns are kept.
        """
        failed, parts, numbers = dict(failed), [], []
        for result in results:
            finite = result.finite
            failed |= self._not_finite(result.take(~finite))
            if finite.any():
                parts.append(self._readings(result.take(finite)))
                numbers.append(result.cells[finite])
        cells = np.concatenate([np.empty(0, np.int64), *numbers])
        columns = {
            name: pa.concat_arrays([part[name] for part in parts]) for name in (parts[0] if parts else ())
        }
        columns |= self._computed(cells, columns)
        everything = np.append(cells, np.array([*failed], np.int64))
        order = np.argsort(everything)
        if failed:
            count = len(failed)
            columns = {
                name: pa.concat_arrays([part, pa.nulls(count, part.type)]) for name, part in columns.items()
            }
            errors = [*columns["error"].to_pylist()[: len(cells)], *failed.values()]
            columns["error"] = pa.array(errors, pa.string())
        columns = {name: part.take(pa.array(order)) for name, part in columns.items()}
        columns |= self._places(self.sweep.cells.block(everything[order]))
        kinds = {name: self._schema.field(name).type for name in self._schema.names}
        arrays = [columns.get(name, pa.nulls(len(order), kind)) for name, kind in kinds.items()]
        return pa.table([pa.array(everything[order]), *arrays], names=[CELL, *kinds])

    def _readings(self, result: PassResult) -> dict[str, pa.Array]:
        """Return the columns of the readout, for the cells of a pass."""
        readout, count = self.sweep.scope.readout, result.n_rows
        block = self.sweep.cells.block(result.cells)
        texts = self._texts(block, result.rows, count) if readout.appends else []
        readings = readout.tabulate(result.columns, self._tokens, texts)
        columns = {name: self._array(name, readings.get(name), count) for name in readout.given}
        if np.array_equal(result.rows, np.arange(count)):
            return columns
        return {name: column.take(pa.array(result.rows)) for name, column in columns.items()}

    def _computed(self, cells: Ints, columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
        """Return the derived columns, the metrics, and the errors of users' functions."""
        block, own = self.sweep.cells.block(cells), [*self.uses, *self.derived]
        rows = [self.sweep.rows[row] for row in block.row.tolist()] if own else []
        known = {**self._places(block), **columns} if own else {}
        computed = compute(self.derived, self.uses, known, rows)
        arrays = {
            name: pa.array(values, self._schema.field(name).type, from_pandas=True)
            for name, values in computed.values.items()
        }
        errors = [" ".join(computed.problems.get(at, ())) or None for at in range(len(cells))]
        none = pa.nulls(len(cells), pa.string())
        return {**arrays, "error": pa.array(errors, pa.string()) if computed.problems else none}

    def _texts(self, block: CellBlock, index: Ints, count: int) -> list[tuple[str, ...]]:
        """Return the texts that were appended, for each row of a readout's columns."""
        entry = np.zeros(count, np.int64)
        entry[index] = block.entry
        return [self.sweep.entries[number].choices for number in entry.tolist()]

    def _array(self, name: str, values: Any, count: int) -> pa.Array:
        """Return a column of a readout as an array of its type."""
        kind = self._schema.field(name).type
        if values is None:
            return pa.nulls(count, kind)
        if isinstance(values, pa.Array):
            return values.cast(kind)
        if isinstance(values, torch.Tensor):
            flat = pa.array(values.reshape(-1).numpy())
            return (flat if values.ndim == 1 else _lists(flat, tuple(values.shape))).cast(kind)
        if kind == pa.list_(pa.list_(pa.float32())):
            return _states(values)
        return pa.array(values, kind)

    def _places(self, block: CellBlock) -> dict[str, pa.Array]:
        """Return the columns that say what was read and where it was written."""
        sweep, cells, n_cells = self.sweep, self.sweep.cells, len(block)
        origin = cells.read_origins.values[cells.read_origins.starts[block.read]]
        source, without = cells.origin_source[origin], ~block.stateful
        unpatched, of_vectors = ~block.patched, sweep.scope.source.vector is not None
        tokenless = np.ones(n_cells, bool) if of_vectors else without  # a vector from a file has no tokens
        texts = pa.string()

        def tokens_read(number: int) -> list[str]:
            prompt, positions = cells.origins[number]
            return [sweep.source_prompts[prompt].tokens[at] for at in positions]

        def tokens_written(number: int) -> list[str]:
            prompt, positions = divmod(number, len(cells.positions))
            return [sweep.target_prompts[prompt].tokens[at] for at in cells.positions.row(positions)]

        def constant(text: str) -> pa.Array:
            return _coded(np.zeros(n_cells, np.int64), lambda _: text, texts)

        written = block.target_prompt * len(cells.positions) + block.positions
        places = {
            "row": pa.array(block.row),
            "control": _coded(
                block.control, lambda code: cells.controls[code], texts, missing=block.control == 0
            ),
            "source_prompt": _coded(source, self._source_text, texts, missing=without),
            "source_position": _coded(
                origin, lambda at: list(cells.origins[at].positions), pa.list_(pa.int64()), missing=tokenless
            ),
            "source_token": _coded(origin, tokens_read, pa.list_(texts), missing=tokenless),
            "source_layer": pa.array(block.layer + sweep.shifts[0], mask=unpatched),
            "target_prompt": _coded(block.target_prompt, lambda at: sweep.target_prompts[at].text, texts),
            "target_position": _coded(
                block.positions, lambda at: list(cells.positions.row(at)), pa.list_(pa.int64())
            ),
            "target_token": _coded(written, tokens_written, pa.list_(texts)),
            "target_layer": pa.array(block.target_layer + sweep.shifts[1], mask=unpatched),
            "source_model": constant(sweep.source.name),
            "target_model": constant(sweep.target.name),
            "mapping": constant(self.mapping),
            "scale": pa.array(block.scale),
            "sample": pa.array(block.sample),
        }
        return {name: places[name] for name in PLACES}

    def _source_text(self, source: int) -> str:
        vectors = self.sweep.scope.source.vector is not None
        return str(self.sweep.vectors[source]) if vectors else self.sweep.source_prompts[source].text

    def _not_finite(self, result: PassResult) -> dict[int, str]:
        """Say for each cell why it has no numbers: where the first value that is not finite occurred."""
        if not len(result.cells):
            return {}
        source, target = (f"{info.name} ({info.dtype})" for info in (self.sweep.source, self.sweep.target))
        other, run = "Another dtype may help.", "the logits or the replaced state of a run without the patch"
        reasons, mode = {}, self.sweep.scope.target.mode
        for cell, row in zip(self.sweep.cells.block(result.cells), result.rows.tolist(), strict=True):
            layer = -1 if cell.source_layer is None else cell.source_layer + self.sweep.shifts[0]
            at = "the embedding" if layer < 0 else f"layer {layer}"
            after = "" if cell.target_layer is None else ", although the state that was written is"
            reasons[cell.number] = {
                "read": f"the hidden state that was read is not finite: {at} of {source}. {other}",
                "written": "the state that was written is not finite, although the state that was read is: "
                f"see mapping {self.mapping}, scale {cell.scale:g}, write {mode}.",
                "replaced": f"the hidden state that the write changes is not finite: {target}. {other}",
                "compared": f"the reference is not finite: {run}, of {source} or {target}. {other}",
                "logits": f"the logits of {target} are not finite{after}. {other}",
            }[result.columns["not_finite"][row]]
        return reasons


def _coded(
    codes: Ints, value: Callable[[int], Any], kind: pa.DataType, *, missing: Flags | None = None
) -> pa.Array:
    """Return a column that holds each distinct value once; values are looked up by their code."""
    distinct = np.unique(codes if missing is None else codes[~missing])
    index = np.searchsorted(distinct, codes).clip(0, max(len(distinct) - 1, 0))
    values = pa.array([value(code) for code in distinct.tolist()], kind)
    narrow = np.min_scalar_type(-len(distinct) - 1)  # the smallest type of signed integers
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(narrow), mask=missing), values)


def _lists(flat: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    """Return (n, k) values as n lists."""
    offsets = np.arange(shape[0] + 1, dtype=np.int32) * shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _states(values: Sequence[torch.Tensor | None]) -> pa.Array:
    """Return states, (n_positions, d_model) or None each, as lists of lists."""
    known = [value for value in values if value is not None]
    flat = torch.cat([value.reshape(-1) for value in known]).numpy() if known else np.empty(0, np.float32)
    widths = [value.shape[1] for value in known for _ in value]
    rows = pa.ListArray.from_arrays(
        pa.array(np.cumsum([0, *widths]), pa.int32()), pa.array(flat, pa.float32())
    )
    counts = np.array([0 if value is None else len(value) for value in values])
    offsets = pa.array(np.cumsum([0, *counts]), pa.int32())
    return pa.ListArray.from_arrays(offsets, rows, mask=pa.array([value is None for value in values]))
