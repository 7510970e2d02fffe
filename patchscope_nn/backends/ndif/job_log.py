"""The jobs of a run, in `jobs.jsonl` of its folder: one line when a job is sent, and one when it ends.

A job is written down before anything else happens, so that a run that is started again finds it. The cells of
each of its results are written with it, because a later plan may divide the cells differently.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from patchscope_nn._util.files import append_lines, cut_half_line, whole_lines

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
        passes: For each pass and each of its results, the numbers of the cells that the result belongs to.
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
        """The numbers of all cells of the job."""
        return tuple(number for rows in self.passes for row in rows for number in row)


class JobLog:
    """The jobs of one run, kept in the run's folder; without a folder, in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / FILE
        self._jobs: dict[str, Job] = {}
        self._mended = False
        if self.file is not None:
            for line in whole_lines(self.file):
                self._take(json.loads(line))

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
            append_lines(self.file, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        known = self._jobs.get(line["id"])
        fields = asdict(known) | line if known else line
        passes = tuple(tuple(map(tuple, rows)) for rows in fields["passes"])
        self._jobs[line["id"]] = Job(**{**fields, "passes": passes})
