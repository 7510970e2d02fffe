"""The rows of a run's table, as parts of columns; a large run is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from patchscope_nn._util.ragged import Ints

#: Columns of a part that are not in the table: the number of each cell in the sweep (-1 if the cell is no
#: longer part of it), and its key.
CELL, KEY = "cell", "cell_key"
#: How many rows are read at a time when all rows are gone through.
_AT_ONCE = 8192


class CellRows(Sequence[Mapping[str, Any]]):
    """The rows of finished cells, in the order of the sweep. A row is a mapping, made on access.

    Args:
        parts: Tables with the columns of a run and `CELL`; or objects with some of the methods of a table,
            which may map files.
        extra: More columns, with a value for each row.
    """

    def __init__(self, parts: Sequence[Any] = (), extra: Mapping[str, Sequence[Any]] | None = None) -> None:
        self._parts, self._extra = [part for part in parts if len(part)], dict(extra or {})
        # Copied, because a view would keep a mapped file open.
        numbers = [np.array(part[CELL].to_numpy()) for part in self._parts]
        #: Where the cells of each part are, in ascending order; None if the part is in order and complete.
        self._orders = [_order(part) for part in numbers]
        self._numbers = [
            part if order is None else part[order] for part, order in zip(numbers, self._orders, strict=True)
        ]
        self._all: Ints = np.sort(np.concatenate([np.empty(0, np.int64), *self._numbers]))

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for part in self.tables():
            yield from part.to_pylist()

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        places = range(len(self))[index]
        if isinstance(places, int):
            row: dict[str, Any] = self._table(places, places + 1).to_pylist()[0]
            return row
        if not places:
            return []
        first, last = min(places), max(places)
        rows: list[Mapping[str, Any]] = self._table(first, last + 1).to_pylist()
        return [rows[place - first] for place in places]

    def tables(self, names: Sequence[str] | None = None, *, size: int = _AT_ONCE) -> Iterator[pa.Table]:
        """Yield the rows as tables of at most `size` rows, with all columns or some of them."""
        for start in range(0, len(self), size):
            yield self._table(start, min(start + size, len(self)), names)

    def column(self, name: str) -> list[Any]:
        """Return the values of a column as Python's own; None for each row if there is no such column."""
        if name in self._extra:
            return list(self._extra[name])
        values: list[Any] = []
        for part in self.tables([name], size=2**16):
            values += part[name].to_pylist() if name in part.column_names else [None] * len(part)
        return values

    def shared(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the values of columns as arrays: numbers, or objects of which equal ones are one object.

        Numbers are NaN where a cell has none, and other values None. Each part is read once.
        """
        values: dict[str, Any] = {}
        parts = self._parts
        # A column that a part lacks is read row by row: its cells have no value.
        kept = [n for n in names if n not in self._extra and all(n in part.column_names for part in parts)]
        known: dict[str, dict[Any, Any]] = {name: {} for name in kept}
        for index, numbers in enumerate(self._numbers):
            table = self._some(index, 0, len(numbers), kept)
            place = np.searchsorted(self._all, numbers)
            for name in kept:
                column = _array(table[name], known[name])
                if name not in values:
                    values[name] = np.empty(len(self), column.dtype)
                # In another part, numbers may be missing.
                kind = np.result_type(values[name], column)
                values[name] = array = values[name].astype(kind, copy=False)
                array[place] = column
        return {name: values[name] if name in values else self.column(name) for name in names}

    def first(self, count: int) -> CellRows:
        """Return the first rows."""
        if len(self) <= count:
            return self
        extra = {name: values[:count] for name, values in self._extra.items()}
        last = self._all[count - 1]
        parts = [
            self._some(index, 0, int(np.searchsorted(numbers, last, side="right")))
            for index, numbers in enumerate(self._numbers)
        ]
        return CellRows(parts, extra)

    def with_columns(self, columns: Mapping[str, Sequence[Any]]) -> CellRows:
        """Return the same rows with more columns."""
        return CellRows(self._parts, {**self._extra, **columns})

    def _table(self, start: int, stop: int, names: Sequence[str] | None = None) -> pa.Table:
        """Return some rows in their order: from each part those whose cells are in the range."""
        low, high = self._all[start], self._all[stop - 1]
        chosen = []
        for index, numbers in enumerate(self._numbers):
            first, last = np.searchsorted(numbers, (low, high + 1)).tolist()
            if first < last:
                chosen.append(decoded(self._some(index, first, last, names)))
        table = chosen[0] if len(chosen) == 1 else pa.concat_tables(chosen, promote_options="permissive")
        if len(chosen) > 1:
            numbers = table[CELL].to_numpy()
            if (np.diff(numbers) < 0).any():
                table = table.combine_chunks().take(pa.array(np.argsort(numbers)))
        table = table.drop_columns([name for name in (CELL, KEY) if name in table.column_names])
        for name, values in self._extra.items():
            if names is None or name in names:
                table = table.append_column(name, pa.array(list(values[start:stop])))
        return table

    def _some(self, index: int, start: int, stop: int, names: Sequence[str] | None = None) -> pa.Table:
        """Return some cells of a part, counted in ascending order, with all columns or some of them."""
        part, order = self._parts[index], self._orders[index]
        if names is not None:
            part = part.select([name for name in (CELL, *names) if name in part.column_names])
        return part.slice(start, stop - start) if order is None else part.take(pa.array(order[start:stop]))


def _order(numbers: Ints) -> Ints | None:
    """Return where cells are in ascending order, without those below 0; None if they are in order."""
    if numbers[0] >= 0 and (np.diff(numbers) > 0).all():
        return None
    order = np.argsort(numbers)
    return order[np.searchsorted(numbers[order], 0) :]


def _array(column: pa.ChunkedArray, known: dict[Any, Any]) -> Any:
    """Return a column as an array; equal values of dictionaries are one object, which is then in `known`."""
    numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if numeric and column.null_count < len(column):
        return column.to_numpy()
    chunks = [_objects(chunk, known) for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _objects(chunk: pa.Array, known: dict[Any, Any]) -> Any:
    if not pa.types.is_dictionary(chunk.type):
        return np.array([*chunk.to_pylist(), None], object)[:-1]
    distinct = [known.setdefault(_key(value), value) for value in chunk.dictionary.to_pylist()]
    objects = np.empty(len(distinct) + 1, object)  # the last is that of cells without a value
    objects[: len(distinct)] = distinct
    return objects[chunk.indices.fill_null(len(distinct)).to_numpy()]


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def decoded(table: pa.Table) -> pa.Table:
    """Return a table whose columns hold their values, where they held numbers of distinct values."""
    columns = [
        pa.chunked_array(
            [part.dictionary.take(part.indices) for part in column.chunks], column.type.value_type
        )
        if pa.types.is_dictionary(column.type)
        else column
        for column in table.columns
    ]
    return pa.table(columns, names=table.column_names)
