"""Runs a plan as jobs on a server, several at a time. No cell is lost, and none is counted twice.

    sent        The job's id is written to the job log before anything else happens. If both models are on
                servers, a first job reads the source states; when they are here, a second one writes them.
    completed   Its rows are written, then it is marked as done.
    lost        The server does not know it any more, or never runs it. Its cells are sent again.
    failed      Through its own fault. It is halved until the guilty cell is found, and recorded as failed.

A server that was restarted may leave jobs in the queue that it has forgotten. Jobs of one model run in the
order in which they were sent. So a job that still waits after a later one has run will wait forever.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from patchscope_nn._util.clocks import utc_now
from patchscope_nn._util.ragged import Ints
from patchscope_nn.backends import Bridged, Server
from patchscope_nn.backends.crossing import source_half, target_half
from patchscope_nn.backends.jobs.client import JobStatus, Patience, nothing_moves, persisting, too_long
from patchscope_nn.backends.jobs.job_log import End, Job, JobLog
from patchscope_nn.backends.jobs.job_size import JobSize
from patchscope_nn.backends.places import client_of
from patchscope_nn.backends.steps import PassResult, pass_result
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.errors import JobError, ServerError
from patchscope_nn.lower import lower, nothing
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model
from patchscope_nn.plan import Plan, Step, plan
from patchscope_nn.sweep import Flags

#: How often cells are sent again after failures that are not their fault.
_TRIES = 4
#: If this many single cells fail before any has a result, the cause is not in the cells.
_GUILTY = 4


class Failed(NamedTuple):
    """Cells that have failed, by number, and why."""

    cells: Ints
    reason: str


Outcome = Iterator[PassResult | Failed]


@dataclass
class _Flight:
    """A job that was sent and has not ended.

    Attributes:
        job: The job.
        rest: For a job that only reads source states, the step that goes on with them, and its program.
        moved: When its status last changed.
        latest: Its latest status and description.
        liveness: Id of a liveness job that was sent after it.
    """

    job: Job
    rest: tuple[Step, StepProgram] | None = None
    moved: float = field(default_factory=time.monotonic)
    latest: tuple[str, str] = ("", "")
    liveness: str | None = None


@dataclass
class Scheduler:
    """Sends the jobs of a plan and collects their results.

    Attributes:
        planned: The plan, without the cells of live jobs.
        backend: Where they run: M* on a server.
        job_log: The run's job log.
        done: True for each finished cell. The caller updates it as results are yielded.
        width: How many jobs may run or wait at a time.
        patience: How long to wait.
        notice: Called with one line about the state of the jobs, each time they are checked. An exception
            that it raises ends the run and leaves its jobs on the server.
    """

    planned: Plan
    _: KW_ONLY
    source: Model
    target: Model
    mapping: ResolvedMapping
    backend: Server | Bridged
    job_log: JobLog
    done: Flags
    width: int
    patience: Patience
    notice: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        ends = self.backend.target if isinstance(self.backend, Bridged) else self.backend
        if not isinstance(ends, Server):
            raise TypeError("the target of jobs is not on a server")
        self.host = ends.host
        self._persist = persisting(self.patience)
        self._flights = [_Flight(job) for job in self.job_log.live() if job.context != "read"]
        for job in self.job_log.live():
            if job.context == "read":  # the process that waited for its states is gone
                self.job_log.ended(job.id, "lost", "the run that read them has ended")
        self._again: deque[Step] = deque()
        self._steps = self.planned.steps()
        self._tries: Counter[int] = Counter()
        self.size = JobSize(self.planned.n_cells)
        self._succeeded, self._guilty = False, 0

    def results(self) -> Iterator[Outcome]:
        """Run all jobs, and yield the cells of each as it ends. Write them before you ask for the next.

        Raises:
            ServerError: The server cannot be reached, or nothing moves; its jobs stay in the job_log.
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
            ended = False
            for flight in tuple(self._flights):
                outcome = self._check(flight)
                if outcome is not None:
                    rows, state, reason = outcome
                    yield rows
                    self.job_log.ended(flight.job.id, state, reason)
                    ended = True
            if ended or before != [flight.latest for flight in self._flights]:
                pause, moved = self.patience.poll_s, time.monotonic()
            elif time.monotonic() - moved > self.patience.give_up_s:
                raise nothing_moves(self.host, self.patience.give_up_s)
            if not ended:
                time.sleep(pause)
                pause = min(pause * 1.3, 10 * self.patience.poll_s)

    def _tell(self) -> None:
        """Call `notice` with one line about the jobs."""
        if self.notice is None:
            return
        latest = [flight.latest for flight in self._flights]
        states = Counter(status.lower() or "sent" for status, _ in latest)
        queue = next((description for _, description in latest if "osition" in description), "")
        parts = [", ".join(f"{number} {state}" for state, number in states.items())]
        parts[0] += f" ({queue.rstrip('.')})" if queue else ""
        if self.size.result_bytes:
            parts.append(f"{self.size.result_bytes / 2**10:,.0f} KiB of results")
        left = self.size.left_s(int((~self.done).sum()))
        if left is not None:
            parts.append(f"about {left:,.0f} s of work left there, and the queue")
        self.notice(f"jobs: {'; '.join(parts)}")

    def _launch(self) -> None:
        """Send jobs until `width` of them are on the server."""
        while len(self._flights) < (1 if self.size.learning else self.width):
            step = self._again.popleft() if self._again else next(self._steps, None)
            if step is None:
                return
            most = self.size.most
            if most is None or len(step.cells) <= most:
                self._send(step)
            else:
                # The rest stays in one piece: by then the right size of a job may be known.
                self._cut([(number,) for number in step.cells.number.tolist()], most)

    def _send(self, step: Step) -> None:
        program = lower(self.planned, step, source=self.source, target=self.target, mapping=self.mapping)
        if step.context != "bridged":
            self._submit(step, program, "fused" if step.context == "fused" else "session")
            return
        reader = self.backend.source if isinstance(self.backend, Bridged) else self.backend
        if isinstance(reader, Server):
            self._submit(step, program, "session", reader=reader)
        else:
            half = source_half(program)
            self._write(step, program, reader.run("session", half, source=self.source, target=self.source))

    def _write(self, step: Step, program: StepProgram, read: Results) -> None:
        """Send the target half of a bridged step whose source states are here."""
        self._submit(step, target_half(program, read), "session")

    def _submit(
        self,
        step: Step,
        program: StepProgram,
        context: Literal["fused", "session"],
        *,
        reader: Server | None = None,
    ) -> None:
        """Send a step as a job and write it down; to a `reader`, only the half that reads the source."""
        host, model = (reader.host, self.source) if reader else (self.host, self.target)
        sent = self._persist(
            client_of(host).submit, context, source_half(program) if reader else program, model
        )
        passes = tuple(self._numbers(step.cells.number[target.cells]) for target in step.targets)
        job = Job(id=sent, host=host, context="read" if reader else context, passes=passes, sent=utc_now())
        self.job_log.sent(job)
        self._flights.append(_Flight(job, (step, program) if reader else None))

    def _numbers(self, numbers: Ints) -> tuple[tuple[int, ...], ...]:
        """Return the cells of each result of a pass: one of its cells, and the copies of that."""
        rows = [[number] for number in numbers.tolist()]
        for copy, index in zip(*self.planned.copies(numbers), strict=True):
            rows[index].append(int(copy))
        return tuple(map(tuple, rows))

    def _check(self, flight: _Flight) -> tuple[Outcome, End, str] | None:
        """Check a job. If it ended with rows: the rows, how it ended, and the server's reason."""
        seen: JobStatus = self._persist(client_of(flight.job.host).look, flight.job.id)
        if seen.words != flight.latest:
            flight.latest, flight.moved, flight.liveness = seen.words, time.monotonic(), None
        if seen.status == "COMPLETED":
            return self._collect(flight, seen)
        if seen.status == "ERROR":
            return self._failed(flight, seen)
        waited = time.monotonic() - flight.moved
        if seen.status == "UNKNOWN" and waited > self.patience.unknown_s:
            self._lost(flight, "the server does not know it")
        elif seen.status in ("QUEUED", "RECEIVED", "UNKNOWN") and waited > self.patience.stalled_s:
            self._send_liveness_job(flight)
        return None

    def _collect(self, flight: _Flight, seen: JobStatus) -> tuple[Outcome, End, str] | None:
        try:
            fused = flight.job.context == "fused"
            results = client_of(flight.job.host).fetch(seen, "fused" if fused else "session")
        except ServerError as error:
            self._lost(flight, error.message)
            return None
        self._flights.remove(flight)
        if flight.rest is not None:
            self._write(*flight.rest, results)
            return iter(()), "done", ""
        self._succeeded = True
        seconds, size = (seen.cost or {}).get("runtime"), len(pickle.dumps(results["passes"]))
        self.size.took(len(flight.job.cells), seconds=seconds, result_bytes=size)
        return self._rows(flight.job, results), "done", ""

    def _rows(self, job: Job, results: Results) -> Outcome:
        """Yield the results of a job, without cells that are already written."""
        shapes = [len(next(iter(columns.values()), ())) for columns in results["passes"]]
        if shapes != (wanted := [len(rows) for rows in job.passes]):
            raise JobError(
                f"{job.host} gave {shapes} results for {wanted} cells, in job {job.id}.",
                hint="Compare the versions of nnsight here and there: patchscope doctor --remote.",
            )
        for columns, rows in zip(results["passes"], job.passes, strict=True):
            cells = np.array([number for row in rows for number in row], np.int64)
            result = pass_result(columns, cells, np.repeat(np.arange(len(rows)), [*map(len, rows)]))
            yield result.take((result.cells >= 0) & ~self.done[result.cells])

    def _failed(self, flight: _Flight, seen: JobStatus) -> tuple[Outcome, End, str] | None:
        error = client_of(flight.job.host).failure(seen)
        if isinstance(error, ServerError):
            self._lost(flight, error.message)
            return None
        if not isinstance(error, JobError):
            self.job_log.ended(flight.job.id, "failed", error.message)
            raise error
        self._flights.remove(flight)
        rows = flight.job.results
        if too_long(seen):
            self.size.too_long(len(rows))
        if len(rows) != 1:
            self.job_log.ended(flight.job.id, "failed", seen.description)
            self._cut(rows, -(-len(rows) // 2))
            return None
        self._guilty += 1
        if self._guilty >= _GUILTY and not self._succeeded:
            self.job_log.ended(flight.job.id, "failed", seen.description)
            raise error
        return iter([Failed(np.sort(rows[0]), error.message)]), "failed", seen.description

    def _cut(self, rows: Iterable[tuple[int, ...]], size: int) -> None:
        """Plan the cells of some rows again, in two pieces; the first has `size` rows."""
        rows = list(rows)
        for piece in (rows[size:], rows[:size]):
            self._again.extendleft(reversed([*self._plan(piece).steps()]))

    def _plan(self, rows: Iterable[tuple[int, ...]]) -> Plan:
        numbers = np.array([number for row in rows for number in row], np.int64)
        left_out = np.ones(len(self.done), bool)
        left_out[np.append(numbers, self.planned.copies(numbers)[0])] = False
        planned = self.planned
        return plan(
            planned.sweep,
            context=planned.context,
            max_rows=planned.budget.max_rows,
            memory=planned.budget.memory,
            done=np.flatnonzero(left_out | self.done),
            remote=True,
            optimisations=planned.optimisations,
        )

    def _lost(self, flight: _Flight, why: str) -> None:
        """Send the cells of a lost job again."""
        self._flights.remove(flight)
        self.job_log.ended(flight.job.id, "lost", why)
        if not flight.job.cells:  # the run has grown, and has other cells in their place
            return
        first = min(flight.job.cells)
        self._tries[first] += 1
        if self._tries[first] >= _TRIES:
            raise ServerError(
                f"{flight.job.host} lost the same cells {_TRIES} times, the last time because {why}.",
                hint="The same command goes on with what is done, once the server works again.",
            )
        self._again.extend(self._plan(flight.job.results).steps())

    def _send_liveness_job(self, flight: _Flight) -> None:
        """Send a job that does nothing. If it runs while the older one waits, that one is lost."""
        client, model = client_of(flight.job.host), self.target if flight.rest is None else self.source
        if flight.liveness is None:
            flight.liveness = self._persist(client.submit, "session", nothing(), model)
            return
        if self._persist(client.look, flight.liveness).status == "COMPLETED":
            again = self._persist(client.look, flight.job.id)
            if again.words == flight.latest:
                self._lost(flight, "the server has forgotten it: a later job has run, and it has not")
