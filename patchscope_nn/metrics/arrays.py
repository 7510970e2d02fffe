"""The columns of cells, as arrays and as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Arrays(Mapping[str, Any]):
    """Columns of pyarrow as numpy arrays: (n,) numbers or objects; (n, k) for lists of equal length.

    A column that has no value in any cell is missing.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = {name: column for name, column in columns.items() if column.null_count < len(column)}

    def __getitem__(self, name: str) -> Any:
        column = self._columns[name]
        values = getattr(column, "values", None)  # a column of lists has all their items here
        if values is None or column.null_count or not hasattr(column, "offsets"):
            return column.to_numpy(zero_copy_only=False)
        offsets = column.offsets.to_numpy()
        counts = offsets[1:] - offsets[:-1]
        if (counts != counts[0]).any():
            return column.to_numpy(zero_copy_only=False)
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), counts[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def as_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return columns of pyarrow as a dict for each cell, with Python's own values."""
    listed = [column.to_pylist() for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*listed, strict=True)]


def of_one_cell(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of one cell as arrays of one; what is None is missing."""
    import numpy as np

    return {name: np.array([value]) for name, value in columns.items() if value not in (None, [])}
