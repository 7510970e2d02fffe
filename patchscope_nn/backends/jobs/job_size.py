"""How many cells a job should have, learned from the jobs that have finished. Pure.

The first job of a large run is small, and shows how long a cell takes. Later jobs are as large as fits into
half a minute: long enough to be worth a request, and far from a server's time limit. The size of a result is
limited too.
"""

from __future__ import annotations

#: How many jobs run or wait on a server at a time, by default.
JOBS = 4
#: A run of up to 1,024 cells is one job. In a larger run the first job has 256 cells.
_WHOLE, _FIRST = 1024, 256
#: How long a job should take, in seconds, and the largest size of its result, in bytes.
_JOB_S, _RESULT_BYTES = 30.0, 2**25
#: The weight of the latest job in the moving average.
_NEW = 0.5


class JobSize:
    """The size of a run's next job.

    Args:
        cells: The number of cells of the run.

    Attributes:
        cell_s: Seconds that a cell takes on the server; None until a job has finished.
        result_bytes: Bytes of all results so far.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.cell_s: float | None = None
        self.result_bytes = 0
        self._cell_bytes = 0.0
        self._ceiling: int | None = None

    @property
    def learning(self) -> bool:
        """True if the next job must finish first, because it shows how large the others should be."""
        return self.cells > _WHOLE and self.cell_s is None

    @property
    def most(self) -> int | None:
        """The most cells of the next job; None for as many as the plan puts into a step."""
        if self.cells <= _WHOLE:
            return self._ceiling
        if self.cell_s is None:
            return min(_FIRST, self._ceiling or _FIRST)
        within = [_JOB_S / self.cell_s if self.cell_s else None, self._ceiling]
        within.append(_RESULT_BYTES / self._cell_bytes if self._cell_bytes else None)
        known = [limit for limit in within if limit is not None]
        return max(1, int(min(known))) if known else None

    def took(self, cells: int, *, seconds: float | None, result_bytes: int) -> None:
        """Learn from a finished job: its cells, the seconds it ran, the bytes of its result."""
        self.result_bytes += result_bytes
        self._cell_bytes = max(self._cell_bytes, result_bytes / cells)
        if seconds is not None:
            now = seconds / cells
            self.cell_s = now if self.cell_s is None else (1 - _NEW) * self.cell_s + _NEW * now
        elif self.cell_s is None:
            self.cell_s = 0.0

    def too_long(self, cells: int) -> None:
        """Learn from a job that exceeded the time limit of its server."""
        self._ceiling = max(1, cells // 2)

    def left_s(self, cells: int) -> float | None:
        """The seconds that this many more cells will take; None if that is not known."""
        return cells * self.cell_s if self.cell_s else None
