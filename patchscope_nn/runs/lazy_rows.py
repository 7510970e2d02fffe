"""The rows of a run's table, read when they are asked for, so that a large run is never held whole."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from patchscope_nn._util.files import whole_lines


class Lines(Sequence[Mapping[str, Any]]):
    """The cells of a `cells.jsonl`, in the order of the sweep, read when they are asked for.

    Attributes:
        file: The file.
        size: How many bytes its whole lines take.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.size = file, 0
        self._numbers, self._starts = array("q"), array("q")
        self._order: list[int] | None = None
        for line in whole_lines(file):
            self.add(int(line[len(_LINE) : line.index(b",")]), len(line))

    def add(self, number: int, length: int) -> None:
        """Take note of the line of a cell that was appended, of so many bytes."""
        self._numbers.append(number)
        self._starts.append(self.size)
        self.size += length
        self._order = None

    def numbers(self) -> Sequence[int]:
        """The numbers of the cells, in the order of the file."""
        return self._numbers

    def _places(self) -> Sequence[int]:
        if self._order is None:
            self._order = sorted(range(len(self._numbers)), key=self._numbers.__getitem__)
        return self._order

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if not len(self):
            return
        with self.file.open("rb") as stream:
            for place in self._places():
                stream.seek(self._starts[place])
                yield _parsed(stream.readline())

    @overload
    def __getitem__(self, place: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        places = self._places()
        with self.file.open("rb") as stream:

            def at(one: int) -> Mapping[str, Any]:
                stream.seek(self._starts[one])
                return _parsed(stream.readline())

            return [at(one) for one in places[place]] if isinstance(place, slice) else at(places[place])


#: How a line begins; the number of its cell comes next.
_LINE = b'{"cell": '


def _parsed(line: bytes) -> Mapping[str, Any]:
    row: dict[str, Any] = json.loads(line)
    del row["cell"]
    return row


class Widened(Sequence[Mapping[str, Any]]):
    """Rows with more columns, each put in when a row is asked for.

    Args:
        rows: The rows.
        columns: A value for each row and name.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]]) -> None:
        self._rows, self._columns = rows, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row, *more in zip(self._rows, *self._columns.values(), strict=True):
            yield {**row, **dict(zip(self._columns, more, strict=True))}

    @overload
    def __getitem__(self, place: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return {**self._rows[place], **{name: values[place] for name, values in self._columns.items()}}
