"""How many cells a job should carry, learned from what jobs took. Pure.

The first job of a large run is short: it tells what a cell takes. From then on a job carries what takes some
time that is worth a request and far from a server's limit, and no more than a result should hold.
"""

from __future__ import annotations

#: How many jobs are on their way to a server at a time, unless told otherwise.
JOBS = 4
#: A run of so many cells is one job, whatever it takes; in a larger one the first job has so many.
_WHOLE, _FIRST = 1024, 256
#: What a job should take, in seconds; what its result should hold at the most, in bytes.
_JOB_S, _RESULT_BYTES = 30.0, 2**25
#: How much a new job counts beside those before it.
_NEW = 0.5


class Pace:
    """The pace of a run's jobs.

    Args:
        cells: How many cells the run has.

    Attributes:
        cell_s: The seconds a cell takes on the server; None as long as nothing is known.
        result_bytes: The bytes of all results so far.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.cell_s: float | None = None
        self.result_bytes = 0
        self._cell_bytes = 0.0
        self._ceiling: int | None = None

    @property
    def learning(self) -> bool:
        """Whether the next job is to be waited for: it tells how large the others should be."""
        return self.cells > _WHOLE and self.cell_s is None

    @property
    def most(self) -> int | None:
        """The most cells of the next job; None for as many as the plan puts together."""
        if self.cells <= _WHOLE:
            return self._ceiling
        if self.cell_s is None:
            return min(_FIRST, self._ceiling or _FIRST)
        within = [_JOB_S / self.cell_s if self.cell_s else None, self._ceiling]
        within.append(_RESULT_BYTES / self._cell_bytes if self._cell_bytes else None)
        known = [one for one in within if one is not None]
        return max(1, int(min(known))) if known else None

    def took(self, cells: int, *, seconds: float | None, result_bytes: int) -> None:
        """Learn from a job that is done: its cells, the seconds it ran, the bytes of its result."""
        self.result_bytes += result_bytes
        self._cell_bytes = max(self._cell_bytes, result_bytes / cells)
        if seconds is not None:
            now = seconds / cells
            self.cell_s = now if self.cell_s is None else (1 - _NEW) * self.cell_s + _NEW * now
        elif self.cell_s is None:
            self.cell_s = 0.0

    def too_long(self, cells: int) -> None:
        """Learn from a job that took longer than its server allows."""
        self._ceiling = max(1, cells // 2)

    def left_s(self, cells: int) -> float | None:
        """The seconds that so many more cells take; None where nothing is known."""
        return cells * self.cell_s if self.cell_s else None
