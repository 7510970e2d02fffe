"""A plan as jobs on a server, several on their way at a time; nothing is lost, and nothing counted twice.

    sent        its id is in the ledger before anything else happens; of two models on servers, first the one
                that reads the source, and when its states are here, the one that writes the target
    completed   its rows are written, then it is marked as done
    lost        the server knows it no longer, or passes it over: its cells are sent again
    failed      by its own fault: it is halved until the guilty cell is found, which is written down as failed

A server that was restarted leaves jobs in the queue that it has forgotten. Jobs of one model run in the order
in which they were sent: one that waits while a later one has run will wait for ever.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from patchscope_nn._util.clocks import utc_now
from patchscope_nn.backends import Bridged, Ndif
from patchscope_nn.backends.crossing import in_place_of, source_half, target_half
from patchscope_nn.backends.ndif import client
from patchscope_nn.backends.ndif.client import Patience, Seen
from patchscope_nn.backends.ndif.job_log import End, Job, Ledger, Passes
from patchscope_nn.backends.ndif.job_size import Pace
from patchscope_nn.body.program import Work
from patchscope_nn.engines import Results
from patchscope_nn.errors import JobError, ServerError
from patchscope_nn.lower import unpack
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model
from patchscope_nn.plan import Plan, Step, plan
from patchscope_nn.sweep import Cell

#: How often cells are sent again for what is not their fault.
_TRIES = 4
#: So many single cells may fail before any has a result; then it is not the cells.
_GUILTY = 4
#: A job that does nothing, and tells whether a server still works.
_NOTHING: dict[str, Any] = {
    "sources": [], "targets": [], "prefix": None, "carried": {}, "sums": [], "keep": [],
    "how": {"mapping": ["identity", None]},
    "source_paths": {}, "target_paths": {},
}  # fmt: skip


@dataclass(frozen=True)
class Failed:
    """In place of a readout: why there is none."""

    reason: str


Rows = Iterator[tuple[Cell, "dict[str, Any] | Failed"]]


@dataclass
class _Flight:
    """A job on its way: when it last moved, and the probe that asks after it.

    Of one that reads the source of a step, `step` and `work` are what goes on with its states.
    """

    job: Job
    step: Step | None = None
    work: Work | None = None
    moved: float = field(default_factory=time.monotonic)
    latest: tuple[str, str] = ("", "")
    probe: str | None = None


class Fleet:
    """The jobs of a plan.

    Args:
        planned: The plan, without the cells of jobs that are live.
        source: M.
        target: M*.
        mapping: f.
        backend: Where they run: M* on a server.
        ledger: The run's client.
        done: The numbers of the cells that are finished; the caller adds to it as rows are given.
        width: How many jobs may be on their way at a time.
        patience: How long to wait for what.
        notice: Called with a line about what the jobs do, at each look at them. What it raises ends the run,
            and leaves its jobs where they are.
    """

    def __init__(
        self,
        planned: Plan,
        *,
        source: Model,
        target: Model,
        mapping: ResolvedMapping,
        backend: Ndif | Bridged,
        ledger: Ledger,
        done: Collection[int],
        width: int,
        patience: Patience,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.planned, self.source, self.target, self.mapping = planned, source, target, mapping
        self.backend, self.ledger, self.done = backend, ledger, done
        self.width, self.patience, self.notice = width, patience, notice
        ends = backend.target if isinstance(backend, Bridged) else backend
        if not isinstance(ends, Ndif):
            raise TypeError("a fleet's target is on a server")
        self.host = ends.host
        self._flights = [_Flight(job) for job in ledger.live() if job.context != "read"]
        for job in ledger.live():
            if job.context == "read":  # whoever was to go on with its states is gone
                ledger.ended(job.id, "lost", "the run that read them has ended")
        self._again: deque[Step] = deque()
        self._steps = planned.steps()
        self._tries: Counter[int] = Counter()
        self.pace = Pace(planned.n_cells)
        self._succeeded, self._guilty = False, 0

    def results(self) -> Iterator[Rows]:
        """Run all jobs; give the cells of each as it ends, to be written before the next is asked for.

        Raises:
            ServerError: The server cannot be reached, or nothing moves; its jobs stay in the ledger.
            JobError: Jobs fail whatever their cells are.
            ModelError: The server cannot run the model.
        """
        pause, moved = self.patience.poll_s, time.monotonic()
        while True:
            self._launch()
            if not self._flights:
                return
            self._tell()
            before = [flight.latest for flight in self._flights]
            landed = False
            for flight in tuple(self._flights):
                found = self._attend(flight)
                if found is not None:
                    rows, state, said = found
                    yield rows
                    self.ledger.ended(flight.job.id, state, said)
                    landed = True
            if landed or before != [flight.latest for flight in self._flights]:
                pause, moved = self.patience.poll_s, time.monotonic()
            elif time.monotonic() - moved > self.patience.give_up_s:
                raise client.nothing_moves(self.host, self.patience.give_up_s)
            if not landed:
                time.sleep(pause)
                pause = min(pause * 1.3, 10 * self.patience.poll_s)

    def _tell(self) -> None:
        if self.notice and self._flights:
            states = Counter(flight.latest[0].lower() or "sent" for flight in self._flights)
            first = next(
                (said for _, said in (flight.latest for flight in self._flights) if "osition" in said), ""
            )
            said = [", ".join(f"{number} {state}" for state, number in states.items())]
            said[0] += f" ({first.rstrip('.')})" if first else ""
            if self.pace.result_bytes:
                said.append(f"{self.pace.result_bytes / 2**10:,.0f} KiB of results")
            left = self.pace.left_s(len(self.planned.sweep.cells) - len(self.done))
            if left is not None:
                said.append(f"about {left:,.0f} s of work left there, and the queue")
            self.notice(f"jobs: {'; '.join(said)}")

    def _launch(self) -> None:
        """Send jobs while there is room."""
        while len(self._flights) < (1 if self.pace.learning else self.width):
            step = self._again.popleft() if self._again else next(self._steps, None)
            if step is None:
                return
            most = self.pace.most
            if most is not None and len(step.cells) > most:
                # What is left over stays in one piece: by then it may be known how large a job should be.
                self._cut([(cell.number,) for cell in step.cells], most)
                continue
            self._send(step)

    def _send(self, step: Step) -> None:
        work = unpack(
            self.planned, step, source=self.source, target=self.target, mapping=self.mapping, states={}
        )
        if step.context != "bridged":
            context: Literal["fused", "session"] = "fused" if step.context == "fused" else "session"
            self._submit(step, work, context=context)
            return
        reader = self.backend.source if isinstance(self.backend, Bridged) else self.backend
        half = source_half(work)
        if isinstance(reader, Ndif):
            sent = client.submit_again(reader.host, "session", half, self.source, self.patience)
            self._away(_Flight(self._job(sent, reader.host, "read", step), step, work))
        else:
            self._write(step, work, reader.run("session", half, source=self.source, target=self.source))

    def _write(self, step: Step, work: Work, read: Results) -> None:
        """Send the target's half of a bridged step, whose source has been read."""
        crossing = in_place_of(work, read["kept"])
        self._submit(step, target_half(work, crossing), context="session")

    def _submit(self, step: Step, work: Work, *, context: Literal["fused", "session"]) -> None:
        sent = client.submit_again(self.host, context, work, self.target, self.patience)
        self._away(_Flight(self._job(sent, self.host, context, step)))

    def _job(self, sent: str, host: str, context: Literal["fused", "session", "read"], step: Step) -> Job:
        return Job(id=sent, host=host, context=context, passes=self._numbers(step), sent=utc_now())

    def _away(self, flight: _Flight) -> None:
        self.ledger.sent(flight.job)
        self._flights.append(flight)

    def _numbers(self, step: Step) -> Passes:
        copies = self.planned.copies
        cells = [[step.cells[place].number for place in one.cells] for one in step.targets]
        return tuple(tuple((number, *copies.get(number, ())) for number in one) for one in cells)

    def _attend(self, flight: _Flight) -> tuple[Rows, End, str] | None:
        """Look after a job; the rows it gives, and how it ended, where it ended with rows."""
        seen = client.look_again(flight.job.host, flight.job.id, self.patience)
        if (seen.status, seen.said) != flight.latest:
            flight.latest, flight.moved, flight.probe = (seen.status, seen.said), time.monotonic(), None
        if seen.status == "COMPLETED":
            return self._land(flight, seen)
        if seen.status == "ERROR":
            return self._failed(flight, seen)
        waited = time.monotonic() - flight.moved
        if seen.status == "UNKNOWN" and waited > self.patience.unknown_s:
            self._lost(flight, "the server does not know it")
        elif seen.status in ("QUEUED", "RECEIVED", "UNKNOWN") and waited > self.patience.stalled_s:
            self._ask_after(flight)
        return None

    def _land(self, flight: _Flight, seen: Seen) -> tuple[Rows, End, str] | None:
        try:
            context: Literal["fused", "session"] = "fused" if flight.job.context == "fused" else "session"
            results = client.fetch(flight.job.host, seen, context)
        except ServerError as error:
            self._lost(flight, error.message)
            return None
        self._flights.remove(flight)
        if flight.step is not None and flight.work is not None:
            self._write(flight.step, flight.work, results)
            return iter(()), "done", ""
        self._succeeded = True
        seconds, size = (seen.cost or {}).get("runtime"), len(pickle.dumps(results["passes"]))
        self.pace.took(len(flight.job.cells), seconds=seconds, result_bytes=size)
        return self._rows(flight.job, results), "done", ""

    def _rows(self, job: Job, results: Results) -> Rows:
        """The cells of a job with their readouts, without those that are written already."""
        shapes = [len(rows) for rows in results["passes"]], [len(rows) for rows in job.passes]
        if shapes[0] != shapes[1]:
            raise JobError(
                f"{job.host} gave {shapes[0]} results for {shapes[1]} cells, in job {job.id}.",
                hint="Compare the versions of nnsight here and there: patchscope doctor --remote.",
            )
        for rows, numbers in zip(results["passes"], job.passes, strict=True):
            for row, cells in zip(rows, numbers, strict=True):
                yield from (
                    (self.planned.sweep.cells[number], row) for number in cells if number not in self.done
                )

    def _failed(self, flight: _Flight, seen: Seen) -> tuple[Rows, End, str] | None:
        error = client.failure(flight.job.host, seen)
        if isinstance(error, ServerError):
            self._lost(flight, error.message)
            return None
        if not isinstance(error, JobError):
            self.ledger.ended(flight.job.id, "failed", error.message)
            raise error
        self._flights.remove(flight)
        rows = [row for one in flight.job.passes for row in one]
        if client.too_long(seen):
            self.pace.too_long(len(rows))
        if len(rows) > 1:
            self.ledger.ended(flight.job.id, "failed", seen.said)
            self._cut(rows, -(-len(rows) // 2))
            return None
        self._guilty += 1
        if self._guilty >= _GUILTY and not self._succeeded:
            self.ledger.ended(flight.job.id, "failed", seen.said)
            raise error
        failed = [(self.planned.sweep.cells[number], Failed(error.message)) for number in rows[0]]
        return iter(failed), "failed", seen.said

    def _cut(self, rows: Iterable[tuple[int, ...]], size: int) -> None:
        """Plan the cells of some rows again, in two pieces, the first of so many."""
        rows = list(rows)
        for piece in (rows[size:], rows[:size]):
            self._again.extendleft(reversed([*self._plan(piece).steps()]))

    def _plan(self, rows: Iterable[tuple[int, ...]]) -> Plan:
        wanted = {number for row in rows for number in (*row, *self.planned.copies.get(row[0], ()))}
        wanted -= set(self.done)
        planned = self.planned
        return plan(
            planned.sweep,
            context=planned.context,
            max_rows=planned.budget.max_rows,
            memory=planned.budget.memory,
            done=set(range(len(planned.sweep.cells))) - wanted,
            remote=True,
            optimisations=planned.optimisations,
        )

    def _lost(self, flight: _Flight, why: str) -> None:
        """Send the cells of a job again."""
        self._flights.remove(flight)
        self.ledger.ended(flight.job.id, "lost", why)
        first = min(flight.job.cells)
        self._tries[first] += 1
        if self._tries[first] >= _TRIES:
            raise ServerError(
                f"{flight.job.host} lost the same cells {_TRIES} times, the last time because {why}.",
                hint="The same command goes on with what is done, once the server works again.",
            )
        self._again.extend(self._plan(row for rows in flight.job.passes for row in rows).steps())

    def _ask_after(self, flight: _Flight) -> None:
        """Send a job that does nothing; if it runs while the older one waits, that one is forgotten."""
        host, model = flight.job.host, self.target if flight.step is None else self.source
        if flight.probe is None:
            flight.probe = client.submit_again(host, "session", _NOTHING, model, self.patience)
            return
        if client.look_again(host, flight.probe, self.patience).status == "COMPLETED":
            again = client.look_again(host, flight.job.id, self.patience)
            if (again.status, again.said) == flight.latest:
                self._lost(flight, "the server has forgotten it: a later job has run, and it has not")
