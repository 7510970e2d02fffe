"""The rows of a run's table, read on access, so that a large run is never in memory as a whole."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from patchscope_nn._util.files import whole_lines


class Lines(Sequence[Mapping[str, Any]]):
    """The cells of a `cells.jsonl`, in the order of the sweep, read on access.

    Attributes:
        file: The file.
        size: The number of bytes of its complete lines.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.size = file, 0
        self._numbers, self._starts = array("q"), array("q")
        self._order: list[int] | None = None
        for line in whole_lines(file):
            self.add(int(line[len(_LINE) : line.index(b",")]), len(line))

    def add(self, number: int, length: int) -> None:
        """Register the line of a cell that was appended to the file; `length` is in bytes."""
        self._numbers.append(number)
        self._starts.append(self.size)
        self.size += length
        self._order = None

    def numbers(self) -> Sequence[int]:
        """Return the numbers of the cells, in the order of the file."""
        return self._numbers

    def _sorted_lines(self) -> Sequence[int]:
        if self._order is None:
            self._order = sorted(range(len(self._numbers)), key=self._numbers.__getitem__)
        return self._order

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if not len(self):
            return
        with self.file.open("rb") as stream:
            for line in self._sorted_lines():
                stream.seek(self._starts[line])
                yield _parsed(stream.readline())

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        lines = self._sorted_lines()
        with self.file.open("rb") as stream:

            def read(line: int) -> Mapping[str, Any]:
                stream.seek(self._starts[line])
                return _parsed(stream.readline())

            return [read(line) for line in lines[index]] if isinstance(index, slice) else read(lines[index])


#: The beginning of every line; the number of its cell follows.
_LINE = b'{"cell": '


def _parsed(line: bytes) -> Mapping[str, Any]:
    row: dict[str, Any] = json.loads(line)
    del row["cell"]
    return row


class Widened(Sequence[Mapping[str, Any]]):
    """Rows with additional columns, which are added on access.

    Args:
        rows: The rows.
        columns: The values of each column, one per row.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]]) -> None:
        self._rows, self._columns = rows, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row, *more in zip(self._rows, *self._columns.values(), strict=True):
            yield {**row, **dict(zip(self._columns, more, strict=True))}

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {**self._rows[index], **{name: values[index] for name, values in self._columns.items()}}
