"""The jobs of a run, in `jobs.jsonl` of its folder: one line when a job is sent, and one when it ends.

A job is written down before anything else happens, so that a run that is started again finds it. The cells of
each of its results are written with it, because a later plan may divide the cells differently. They are
written by their keys, by which a run that has grown finds them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchscope_nn._util.files import append_lines, cut_half_line, whole_lines
from patchscope_nn.sweep import CellIndex

FILE = "jobs.jsonl"
Passes = tuple[tuple[tuple[int, ...], ...], ...]
End = Literal["done", "failed", "lost", "dropped"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was sent.

    Attributes:
        id: Its id on the server.
        host: The server's URL.
        context: `session` or `fused`; `read` if it only reads source states, for a target on another server.
        passes: For each pass and each of its results, the numbers of the cells that the result belongs to; -1
            for a cell that is no longer part of the run.
        sent: When it was sent, in UTC.
        state: `live`, or how it ended.
        said: The server's reason for that.
    """

    id: str
    host: str
    context: Literal["session", "fused", "read"]
    passes: Passes
    sent: str
    state: str = "live"
    said: str = ""

    @property
    def cells(self) -> tuple[int, ...]:
        """The numbers of all cells of the job that are part of the run."""
        return tuple(number for row in self.results for number in row)

    @property
    def results(self) -> list[tuple[int, ...]]:
        """The cells of each result that are part of the run, without results that have none."""
        rows = (tuple(number for number in row if number >= 0) for rows in self.passes for row in rows)
        return [row for row in rows if row]


class JobLog:
    """The jobs of one run, kept in the run's folder; without a folder, in memory only.

    Args:
        folder: The run's folder.
        index: Finds the cells of the run. Without it, cells have their keys in the place of numbers.
    """

    def __init__(self, folder: Path | None, index: CellIndex | None = None) -> None:
        self.file = None if folder is None else folder / FILE
        self._index = index
        self._jobs: dict[str, Job] = {}
        self._mended = False
        if self.file is not None:
            for line in whole_lines(self.file):
                self._take(self._numbered(json.loads(line)))

    def jobs(self) -> tuple[Job, ...]:
        """All jobs, in the order in which they were sent."""
        return tuple(self._jobs.values())

    def live(self) -> tuple[Job, ...]:
        """The jobs that were sent and have not ended."""
        return tuple(job for job in self._jobs.values() if job.state == "live")

    def sent(self, job: Job) -> None:
        """Record that a job was sent."""
        self._write(asdict(job))

    def ended(self, job: str, state: End, said: str = "") -> None:
        """Record how a job ended."""
        self._write({"id": job, "state": state, "said": said})

    def drop(self) -> int:
        """Mark all live jobs as dropped, because nobody will fetch them. Returns their number."""
        live = self.live()
        for job in live:
            self.ended(job.id, "dropped", "cancelled by its user")
        return len(live)

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            if not self._mended:
                cut_half_line(self.file)
                self._mended = True
            append_lines(self.file, json.dumps(self._keyed(line), ensure_ascii=False).encode() + b"\n")
        self._take(line)

    def _keyed(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return a line with keys in the place of numbers."""
        if self._index is None or "passes" not in line:
            return line
        keys = self._index.keys
        passes = [[keys[list(row)].tolist() for row in rows] for rows in line["passes"]]
        return {**line, "passes": passes}

    def _numbered(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return a line with numbers in the place of keys."""
        if self._index is None or "passes" not in line:
            return line
        keys = np.array([key for rows in line["passes"] for row in rows for key in row], np.uint64)
        numbers = iter(self._index.find(keys).tolist())
        passes = [[[next(numbers) for _ in row] for row in rows] for rows in line["passes"]]
        return {**line, "passes": passes}

    def _take(self, line: dict[str, Any]) -> None:
        known = self._jobs.get(line["id"])
        fields = asdict(known) | line if known else line
        passes = tuple(tuple(map(tuple, rows)) for rows in fields["passes"])
        self._jobs[line["id"]] = Job(**{**fields, "passes": passes})
