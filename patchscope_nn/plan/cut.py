"""Cuts ordered items into batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from patchscope_nn.sweep import Flags


def cut(count: int, fits: Callable[[slice], Flags], *, most: int) -> Iterator[slice]:
    """Yield items, in order, in the longest batches that fit. A single item always fits.

    Args:
        count: The number of items.
        fits: Called with a slice of them; returns for each of these whether a batch fits that begins with the
            first of the slice and ends with this one.
        most: The most items of a batch.
    """
    start = 0
    while start < count:
        stop = min(start + most, count)
        too_much = (~fits(slice(start, stop))[1:]).nonzero()[0]
        stop = start + 1 + int(too_much[0]) if len(too_much) else stop
        yield slice(start, stop)
        start = stop
