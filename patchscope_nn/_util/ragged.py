"""Rows of different lengths in one array."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

#: An array of whole numbers.
Ints: TypeAlias = npt.NDArray[np.int64]


class Ragged:
    """Rows of whole numbers, which may differ in length, one after the other in one array.

    Args:
        rows: The rows.

    Attributes:
        values: The numbers of all rows.
        starts: (n_rows,) where each row starts in `values`.
        counts: (n_rows,) the length of each row.
    """

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        kept = list(rows)
        self.counts: Ints = np.fromiter(map(len, kept), np.int64, len(kept))
        self.starts: Ints = np.cumsum(self.counts) - self.counts
        total = int(self.counts.sum())
        self.values: Ints = np.fromiter((number for row in kept for number in row), np.int64, total)

    def __len__(self) -> int:
        return len(self.counts)

    def row(self, number: int) -> tuple[int, ...]:
        """Return one row."""
        start = self.starts[number]
        return tuple(self.values[start : start + self.counts[number]].tolist())

    def take(self, rows: Ints) -> tuple[Ints, Ints]:
        """Return the numbers of some rows, one after the other, and for each number its index in `rows`."""
        counts = self.counts[rows]
        index = np.repeat(np.arange(len(rows)), counts)
        return self.values[ranges(self.starts[rows], counts)], index


def ranges(starts: Ints, counts: Ints) -> Ints:
    """Return the ranges that begin at `starts` and have `counts` numbers, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def first_seen(values: Ints) -> tuple[Ints, Ints]:
    """Return the distinct values, in the order in which they first occur, and for each value its index."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return distinct[order], place[inverse]
